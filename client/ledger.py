"""What a site has released about its patients: an append-only file at the site, charged before any training.

    LEDGER/ledger.jsonl   how it was opened, then one line per charge, commit, failure, change of policy or repair
    LEDGER.replica        its replica (`ledger_replica` in site.yaml names another place): see
                          `fedcmr.client.hash_chained_log`
    LEDGER/replies/       the private updates that were committed, to be sent again where a message is repeated
    LEDGER/work           locked by the process that works on the patients, from the charge to the commit

What is spent is the sum of the charges' costs, which stand in their lines, counted by a filter that holds for requests
that are chosen in the light of earlier answers: `fedcmr.shared.privacy_filter`. A line that opens the ledger or changes
its policy names the filter's `order` (null: the Gaussian filter), chosen from the policy alone, and what the charges
before it cost there, `carried`. A charge whose work failed says so in a line of its own, and is as final as a commit.
One ledger belongs to one data set, identified by the key of its pseudonyms, and notes the policy under which it
charges. That guards against accidents, clean-ups and restored backups. It cannot guard against whoever changes or
removes both copies, or starts a second ledger over the same patients: that is the site itself, and the budget is its
own promise to its patients.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedcmr.client.hash_chained_log import HashChainedLog, LedgerError, Lines
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from fedcmr.shared.privacy import Release
from fedcmr.shared.privacy_filter import PrivacyFilter, mu_squared, renyi_order
from fedcmr.shared.records import INTERNAL_ERROR

LEDGER_NAME, REPLIES_NAME, WORK_NAME = "ledger.jsonl", "replies", "work"
REPLICA_SUFFIXES = (".replica", ".witness")
"""Today\'s, and that of earlier versions, whose replicas keep their names."""
FORMAT = 3
"""Ledgers of format 2 can be read and continued: their lines hold no costs, which follow from the releases."""
OPEN, CHARGE, COMMIT, FAILURE, POLICY, REPAIR = "open", "charge", "commit", "failure", "policy", "repair"
CLOCK_TOLERANCE = timedelta(minutes=1)
"""By which network time may set a clock back."""


class BudgetExhausted(UserError):  # noqa: N818
    """The charge would take the site past its cap; nothing was charged."""

    code = "budget-exhausted"


class WorkFailed(UserError):  # noqa: N818
    """The request was charged before and its work failed, which is final."""

    code = INTERNAL_ERROR


class Ledger:
    """The ledger in a folder, which is made on first use.

    Guarantees:
        A release is charged and on the disk, in both copies, before `reserve` returns, and never taken back, not even
        where the training failed or the server dropped the reply. Processes that reserve at once cannot pass the cap
        together, whatever was requested in the light of earlier answers
        (`fedcmr.shared.privacy_filter.PrivacyFilter`). A message that is repeated costs nothing and gets the same
        answer: the same bytes, or the same failure. Work is done once for a charge: where a process died in between,
        its charge has failed. Not covered: another ledger over the same patients, and runs without privacy, which are
        not charged.

    Args:
        folder: The ledger's folder.
        replica: Path of the replica; by default next to the folder.
        dataset: From `dataset_of`: a ledger that was opened for another data set charges nothing.
        policy: The site's, noted with the first charge and whenever it has changed.
    """

    def __init__(
        self, folder: Path, replica: Path | None = None, dataset: str = "", policy: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.dataset, self.policy = folder, dataset, dict(policy or {})
        self._log = HashChainedLog(folder / LEDGER_NAME, default_replica(folder) if replica is None else replica)
        self._reserved: dict[tuple[str, int], int] = {}  # this object's charges, by their number in the ledger

    def reserve(
        self, run_id: str, server_round: int, release: Release, delta: float, cap: float, task: str = ""
    ) -> None:
        """Charge a release. Whoever works on patients under the charge holds `working` from before this on.

        Args:
            run_id: The server's name of the run.
            server_round: Round of that run.
            release: What the site is about to release.
            delta: The delta at which epsilon is computed.
            cap: Epsilon over the life of the ledger, this release included.
            task: What the release is, for the reader of the history.

        Raises:
            WorkFailed: The same release was charged for this run and round, and has no reply: its work has failed or
                its process died. It is not done again; the failure is noted and final.
            BudgetExhausted: The sum would exceed the cap.
            LedgerError: The ledger was damaged, is of another data set, cannot be written, or the clock went back.
        """
        wanted = {"run_id": run_id, "round": server_round, "release": asdict(release)}
        with self._log.locked() as lines:
            self._check_dataset(lines)
            charges = _charges(lines.entries)
            for number, charge in enumerate(charges):
                if charge["reply"] is None and all(charge[key] == value for key, value in wanted.items()):
                    if charge["failure"] is None:
                        self._append(lines, FAILURE, {"charge": number, "code": INTERNAL_ERROR})
                    raise WorkFailed(f"{self.folder}: this request was charged before, and its work failed or ended")
            privacy_filter, carried = self._next_filter(lines.entries, [release])
            cost = privacy_filter.cost(release)
            spent = privacy_filter.epsilon(carried + cost, delta)
            if not spent <= cap:
                raise BudgetExhausted(f"{self.folder}: expected epsilon <= {cap:g} after this release, got {spent:.4g}")
            self._check_clock(lines)
            self._note_policy(lines, privacy_filter.order, carried)
            terms = {
                "delta": delta,
                "epsilon": _json_number(spent),
                "accountant": privacy_filter.accountant,
                "cap": _json_number(cap),
                "mu_squared": _json_number(mu_squared(release)),
                "renyi": None if privacy_filter.order is None else _json_number(cost),
            }
            self._append(lines, CHARGE, {**wanted, "task": task, **terms})
            self._reserved[run_id, server_round] = len(charges)

    def check(self, releases: Sequence[Release], delta: float, cap: float) -> float:
        """Epsilon after all of these releases, if each were charged; nothing is written.

        Raises:
            BudgetExhausted, LedgerError: As `reserve` would.
        """
        with self._log.locked() as lines:
            self._check_dataset(lines)
            privacy_filter, carried = self._next_filter(lines.entries, releases)
            spent = privacy_filter.epsilon(carried + math.fsum(map(privacy_filter.cost, releases)), delta)
            if not spent <= cap:
                raise BudgetExhausted(f"{self.folder}: expected epsilon <= {cap:g} after this study, got {spent:.4g}")
            self._check_clock(lines)
        return spent

    @contextmanager
    def working(self) -> Iterator[None]:
        """Held from before `reserve` until after `commit` or `fail`: another process with this ledger waits its turn.

        Raises:
            LedgerError: The ledger was damaged, or cannot be written.
        """
        with self._log.locked():
            pass  # makes the folder, and checks that it is nobody else's to write
        try:
            file = (self.folder / WORK_NAME).open("a")
        except OSError as error:
            raise LedgerError(f"{self.folder}: expected a ledger that can be written, got {error}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def fail(self, run_id: str, server_round: int) -> None:
        """Note that the work for what this object reserved has failed: the same request never gets another answer.

        Raises:
            ValueError: This object reserved nothing for the round.
            LedgerError: The ledger was damaged, or cannot be written; the charge then fails when it is requested again.
        """
        number = self._reserved.pop((run_id, server_round), None)
        with self._log.locked() as lines:
            self._check_open(lines, number, server_round)
            self._append(lines, FAILURE, {"charge": number, "code": INTERNAL_ERROR})

    def commit(self, run_id: str, server_round: int, reply: bytes) -> None:
        """Keep the reply to what this object reserved; only after this may it leave the site.

        Raises:
            ValueError: This object reserved nothing for the round, or another process has committed its reply.
            LedgerError: The ledger was damaged, or cannot be written.
        """
        number = self._reserved.pop((run_id, server_round), None)
        with self._log.locked() as lines:
            self._check_open(lines, number, server_round)
            sha256 = hashlib.sha256(reply).hexdigest()
            path = self.folder / REPLIES_NAME / sha256
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomically(path, reply)
            self._append(lines, COMMIT, {"charge": number, "reply": sha256})

    def cached_reply(self, run_id: str, server_round: int, release: Release | None = None) -> bytes | None:
        """The newest committed reply of this run and round; None where there is none or its file is gone.

        Args:
            run_id: The server's name of the run.
            server_round: Round of that run.
            release: Where given, only a reply to this very release.

        Raises:
            LedgerError: The ledger was damaged.
        """
        for charge in reversed(self.charges()):
            same = (charge["run_id"], charge["round"]) == (run_id, server_round)
            if same and charge["reply"] and (release is None or charge["release"] == asdict(release)):
                path = self.folder / REPLIES_NAME / charge["reply"]
                reply = path.read_bytes() if path.is_file() else b""
                return reply if hashlib.sha256(reply).hexdigest() == charge["reply"] else None
        return None

    def charges(self) -> list[dict[str, Any]]:
        """Every charge, oldest first: its terms, UTC `time`, the SHA-256 of its `reply` and the code of its `failure`.

        One of the last two is None, and both are until the work has ended.
        """
        with self._log.locked() as lines:
            return _charges(lines.entries)

    def releases(self) -> list[Release]:
        """Everything that was ever charged, committed or not, oldest first."""
        return _releases(self.charges())

    def spent(self, delta: float) -> float:
        """Epsilon of everything that was ever charged."""
        return self.account(delta)[0]

    def account(self, delta: float) -> tuple[float, str]:
        """Epsilon of everything that was ever charged, by the filter that the ledger has noted, and its name."""
        with self._log.locked() as lines:
            privacy_filter, spent = _noted_filter(lines.entries)
        return privacy_filter.epsilon(spent, delta), privacy_filter.accountant

    def epsilons(self, delta: float) -> list[float]:
        """Epsilon after every charge, by the filter that was in force then."""
        with self._log.locked() as lines:
            states = zip(lines.entries, _filter_states(lines.entries), strict=True)
            return [
                privacy_filter.epsilon(spent, delta)
                for entry, (privacy_filter, spent) in states
                if entry["kind"] == CHARGE
            ]

    def changes(self) -> list[dict[str, Any]]:
        """The lines that are no release: how the ledger was opened, changes of policy and repairs, oldest first."""
        with self._log.locked() as lines:
            return [entry for entry in lines.entries if entry["kind"] in (OPEN, POLICY, REPAIR)]

    def repair(self) -> None:
        """Repair one damaged or missing copy from the other, and accept a clock that went back; noted in the ledger.

        Never lowers what is spent: see `fedcmr.client.hash_chained_log.HashChainedLog.repair`.

        Raises:
            LedgerError: No copy can be trusted.
        """
        self._log.repair({"kind": REPAIR, "time": _utc_now().isoformat()})

    def _append(self, lines: Lines, kind: str, values: Mapping[str, Any]) -> None:
        """Write one line, with the time, which never runs backwards in the file."""
        time = max([_utc_now(), *_last_time(lines)])
        self._log.append(lines, {"kind": kind, "time": time.isoformat(), **values})

    def _next_filter(
        self, entries: Sequence[Mapping[str, Any]], releases: Sequence[Release]
    ) -> tuple[PrivacyFilter, float]:
        """The filter for these next releases, and what the earlier ones cost there.

        Another filter than before, where the policy has changed, counts all of them anew, once.
        """
        known, spent = _noted_filter(entries)
        earlier = _releases(_charges(entries))
        wanted = _filter_for(self.policy, [*earlier, *releases])
        return (known, spent) if wanted == known else (wanted, math.fsum(map(wanted.cost, earlier)))

    def _note_policy(self, lines: Lines, order: int | None, carried: float) -> None:
        """Note the policy and the filter that the next charge is made under, where the ledger does not say so yet."""
        if not lines.entries:
            opened = {"format": FORMAT, "dataset": self.dataset, "policy": self.policy, "order": order, "carried": 0.0}
            self._append(lines, OPEN, opened)
            return
        last = [entry for entry in lines.entries if "policy" in entry][-1]
        if (last["policy"], last.get("order")) != (self.policy, order):
            self._append(lines, POLICY, {"policy": self.policy, "order": order, "carried": _json_number(carried)})

    def _check_open(self, lines: Lines, number: int | None, server_round: int) -> None:
        charge = None if number is None else _charges(lines.entries)[number]
        if charge is None or charge["reply"] is not None or charge["failure"] is not None:
            raise ValueError(f"Expected a charge without a reply for round {server_round}, got none.")

    def _check_dataset(self, lines: Lines) -> None:
        if lines.entries and lines.entries[0]["dataset"] != self.dataset:
            raise LedgerError(
                f"{self.folder}: expected the data set that this ledger was opened for, got cases with pseudonyms of "
                "another key; prepare them with the earlier key or, if none of these patients is in this ledger, name "
                "another 'ledger' in site.yaml"
            )

    def _check_clock(self, lines: Lines) -> None:
        """A machine whose clock has gone back may be a restored snapshot, and its ledger an old one."""
        now = _utc_now()
        if any(now < last - CLOCK_TOLERANCE for last in _last_time(lines)):
            raise LedgerError(
                f"{self.folder}: expected a clock past the ledger's last line, got {now.isoformat()}; set the clock "
                "right or, where it is right, run 'fedcmr-client budget --repair'"
            )


def default_replica(folder: Path) -> Path:
    """Where the replica lies unless site.yaml says otherwise: next to the ledger's folder."""
    replica, earlier = (folder.with_name(folder.name + suffix) for suffix in REPLICA_SUFFIXES)
    return earlier if earlier.exists() and not replica.exists() else replica


def dataset_of(folder: Path) -> str:
    """SHA-256 that identifies a data set: by the key of its pseudonyms, so it stays as patients are added.

    Folders that `fedcmr-client prepare` did not make have no key: they count as one data set.

    Raises:
        UserError: The folder's settings cannot be read.
    """
    path = folder / PREPARED_NAME
    try:
        key_check = str(json.loads(path.read_bytes())["key_check"])
    except FileNotFoundError:
        key_check = ""
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: expected what 'fedcmr-client prepare' wrote; prepare the folder again") from None
    return hashlib.sha256(f"fedcmr data set {key_check}".encode()).hexdigest()


def _charges(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines that charge a release, each with the SHA-256 of its reply or the code of its failure, once there."""
    charges: list[dict[str, Any]] = []
    for entry in entries:
        if entry["kind"] == CHARGE:
            charges.append({**entry, "reply": None, "failure": None})
        elif entry["kind"] == COMMIT:
            charges[entry["charge"]]["reply"] = entry["reply"]
        elif entry["kind"] == FAILURE:
            charges[entry["charge"]]["failure"] = entry["code"]
    return charges


def _releases(charges: Sequence[Mapping[str, Any]]) -> list[Release]:
    return [Release(**charge["release"]) for charge in charges]


def _filter_for(policy: Mapping[str, Any], releases: Sequence[Release]) -> PrivacyFilter:
    """The policy's filter for these releases; one of a random sample that the policy no longer allows still counts.

    A ledger without a policy has the Gaussian filter, under which every release counts as one of everybody.
    """
    sampled = policy.get("min_sample_rate", 1) < 1 or any(release.sample_rate < 1 for release in releases)
    if sampled and {"max_epsilon", "max_delta"} <= set(policy):
        return PrivacyFilter(renyi_order(policy["max_epsilon"], policy["max_delta"]))
    return PrivacyFilter()


def _noted_filter(entries: Sequence[Mapping[str, Any]]) -> tuple[PrivacyFilter, float]:
    """The filter that the ledger's newest policy names, and the sum of all costs there."""
    return (_filter_states(entries) or [(PrivacyFilter(), 0.0)])[-1]


def _filter_states(entries: Sequence[Mapping[str, Any]]) -> list[tuple[PrivacyFilter, float]]:
    """The filter in force and the sum of costs, after every line.

    Lines of format 2 name no filter and hold no costs: the releases and the policy tell both.
    """
    earlier = [entry for entry in entries if entry["kind"] == CHARGE and "mu_squared" not in entry]
    policies = [entry["policy"] for entry in entries if "policy" in entry and "order" not in entry]
    privacy_filter, spent = _filter_for(policies[-1] if policies else {}, _releases(earlier)), 0.0
    states = []
    for entry in entries:
        if "order" in entry:
            privacy_filter, spent = PrivacyFilter(entry["order"]), _number(entry["carried"])
        elif entry["kind"] == CHARGE and "mu_squared" in entry:
            spent += _number(entry["mu_squared" if privacy_filter.order is None else "renyi"])
        elif entry["kind"] == CHARGE:
            spent += privacy_filter.cost(Release(**entry["release"]))
        states.append((privacy_filter, spent))
    return states


def _last_time(lines: Lines) -> list[datetime]:
    """The last line's time; none without a line."""
    return [datetime.fromisoformat(entry["time"]) for entry in lines.entries[-1:]]


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _number(value: float | None) -> float:
    """Back from `_json_number`."""
    return math.inf if value is None else value


def _json_number(value: float) -> float | None:
    """A number for strict JSON; None for infinity."""
    return value if math.isfinite(value) else None
