"""What a site has released about its patients: an append-only file at the site, charged before any training.

    LEDGER/ledger.jsonl   how it was opened, then one line per charge, commit, change of policy or repair
    LEDGER.witness        its second copy (`ledger_witness` in site.yaml names another place): see `client.chain`
    LEDGER/replies/       the private updates that were committed, to be sent again where a message is repeated

One ledger belongs to one data set, told by the key of its pseudonyms, and notes the policy under which it charges.
That guards against accidents, clean-ups and restored backups. It cannot guard against whoever changes or removes both
copies, or starts a second ledger over the same patients: that is the site itself, and the budget is its own promise to
its patients.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from client.chain import Chain, LedgerError, Lines
from shared.checkpoint import write_atomically
from shared.errors import UserError
from shared.privacy import Release, epsilon

LEDGER_NAME, REPLIES_NAME = "ledger.jsonl", "replies"
FORMAT = 2
OPEN, CHARGE, COMMIT, POLICY, REPAIR = "open", "charge", "commit", "policy", "repair"
CLOCK_TOLERANCE = timedelta(minutes=1)
"""By which network time may set a clock back."""
PREPARED_NAME = "prepared.json"
"""Settings that `fedcmr-client prepare` leaves beside the cases."""


class BudgetExhausted(UserError):  # noqa: N818
    """The charge would take the site past its cap; nothing was charged."""

    code = "budget-exhausted"


class Ledger:
    """The ledger in a folder, which is made on first use.

    Guarantees:
        A release is charged and on the disk, in both copies, before `reserve` returns, and never taken back, not even
        where the training failed or the server dropped the reply. Processes that reserve at once cannot pass the cap
        together. A message that is repeated costs nothing: before its commit nothing has left the site, after it the
        same bytes leave.
        Not covered: another ledger over the same patients, and runs without privacy, which are not charged.

    Args:
        folder: Of the ledger.
        witness: The second copy; by default beside the folder.
        dataset: From `dataset_of`: a ledger that was opened for another data set charges nothing.
        policy: The site's, noted with the first charge and whenever it has changed.
    """

    def __init__(
        self, folder: Path, witness: Path | None = None, dataset: str = "", policy: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.dataset, self.policy = folder, dataset, dict(policy or {})
        self._chain = Chain(folder / LEDGER_NAME, default_witness(folder) if witness is None else witness)
        self._reserved: dict[tuple[str, int], int] = {}  # this object's charges, by their number in the ledger

    def reserve(
        self, run_id: str, server_round: int, release: Release, delta: float, cap: float, task: str = ""
    ) -> None:
        """Charge a release; without effect where the same one is charged for this run and round but not committed.

        Args:
            run_id: The server's name of the run.
            server_round: Round of that run.
            release: What the site is about to release.
            delta: At which epsilon is computed.
            cap: Epsilon over the life of the ledger, this release included.
            task: What the release is, for the reader of the history.

        Raises:
            BudgetExhausted: The sum would exceed the cap.
            LedgerError: The ledger was damaged, is of another data set, cannot be written, or the clock went back.
        """
        wanted = {"run_id": run_id, "round": server_round, "release": asdict(release)}
        with self._chain.locked() as lines:
            self._check_dataset(lines)
            charges = _charges(lines.entries)
            for number, charge in enumerate(charges):
                if charge["reply"] is None and all(charge[key] == value for key, value in wanted.items()):
                    self._reserved[run_id, server_round] = number
                    return
            spent, accountant = epsilon([*_releases(charges), release], delta)
            if not spent <= cap:
                raise BudgetExhausted(f"{self.folder}: expected epsilon <= {cap:g} after this release, got {spent:.4g}")
            self._check_clock(lines)
            self._note_policy(lines)
            terms = {"delta": delta, "epsilon": _json_number(spent), "accountant": accountant, "cap": _json_number(cap)}
            self._append(lines, CHARGE, {**wanted, "task": task, **terms})
            self._reserved[run_id, server_round] = len(charges)

    def commit(self, run_id: str, server_round: int, reply: bytes) -> None:
        """Keep the reply to what this object reserved; only after this may it leave the site.

        Raises:
            ValueError: This object reserved nothing for the round, or another process has committed its reply.
            LedgerError: The ledger was damaged, or cannot be written.
        """
        number = self._reserved.pop((run_id, server_round), None)
        with self._chain.locked() as lines:
            if number is None or _charges(lines.entries)[number]["reply"] is not None:
                raise ValueError(f"Expected a charge without a reply for round {server_round}, got none.")
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
        """Every charge, oldest first: its terms, UTC `time`, and the SHA-256 of its `reply`, None before the commit."""
        with self._chain.locked() as lines:
            return _charges(lines.entries)

    def releases(self) -> list[Release]:
        """Everything that was ever charged, committed or not, oldest first."""
        return _releases(self.charges())

    def spent(self, delta: float) -> float:
        """Epsilon of everything that was ever charged."""
        return epsilon(self.releases(), delta)[0]

    def changes(self) -> list[dict[str, Any]]:
        """The lines that are no release: how the ledger was opened, changes of policy and repairs, oldest first."""
        with self._chain.locked() as lines:
            return [entry for entry in lines.entries if entry["kind"] in (OPEN, POLICY, REPAIR)]

    def repair(self) -> None:
        """Mend one damaged or missing copy from the other, and accept a clock that went back; noted in the ledger.

        Never lowers what is spent: see `client.chain.Chain.repair`.

        Raises:
            LedgerError: No copy can be trusted.
        """
        self._chain.repair({"kind": REPAIR, "time": _utc_now().isoformat()})

    def _append(self, lines: Lines, kind: str, values: Mapping[str, Any]) -> None:
        """Write one line, with the time, which never runs backwards in the file."""
        time = max([_utc_now(), *_last_time(lines)])
        self._chain.append(lines, {"kind": kind, "time": time.isoformat(), **values})

    def _note_policy(self, lines: Lines) -> None:
        """Note the policy that the next charge is made under, where the ledger does not say so yet."""
        if not lines.entries:
            self._append(lines, OPEN, {"format": FORMAT, "dataset": self.dataset, "policy": self.policy})
        elif [entry["policy"] for entry in lines.entries if "policy" in entry][-1] != self.policy:
            self._append(lines, POLICY, {"policy": self.policy})

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


def default_witness(folder: Path) -> Path:
    """Where the second copy lies unless site.yaml says otherwise: beside the ledger's folder."""
    return folder.with_name(folder.name + ".witness")


def dataset_of(folder: Path) -> str:
    """SHA-256 that tells one data set from another: by the key of its pseudonyms, so it stays as patients are added.

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
    """The lines that charge a release, each with the SHA-256 of its reply once that is committed."""
    charges: list[dict[str, Any]] = []
    for entry in entries:
        if entry["kind"] == CHARGE:
            charges.append({**entry, "reply": None})
        elif entry["kind"] == COMMIT:
            charges[entry["charge"]]["reply"] = entry["reply"]
    return charges


def _releases(charges: Sequence[Mapping[str, Any]]) -> list[Release]:
    return [Release(**charge["release"]) for charge in charges]


def _last_time(lines: Lines) -> list[datetime]:
    """The last line's time; none without a line."""
    return [datetime.fromisoformat(entry["time"]) for entry in lines.entries[-1:]]


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _json_number(value: float) -> float | None:
    """A number for strict JSON; None for infinity."""
    return value if math.isfinite(value) else None
