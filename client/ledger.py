"""What a site has released about its patients: an append-only file at the site, charged before any training.

    LEDGER/ledger.jsonl   one line per charge or commit; each holds the SHA-256 of the line before it
    LEDGER/head.json      how much of that file is known to be on the disk, and its last line's SHA-256
    LEDGER/replies/       the private updates that were committed, to be sent again where a message is repeated

The two files disagree after an edit, a truncation or a deletion, and the ledger then refuses to answer. That guards
against accidents and clean-ups. It cannot guard against whoever edits both files, restores an older copy of both, or
removes the folder: that is the site itself, and the budget is its own promise to its patients.
"""

import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.checkpoint import write_atomically
from shared.errors import UserError
from shared.privacy import Release, epsilon

LEDGER_NAME, HEAD_NAME, LOCK_NAME, REPLIES_NAME = "ledger.jsonl", "head.json", "lock", "replies"
FIRST_HASH = "0" * 64


class BudgetExhausted(UserError):  # noqa: N818
    """The charge would take the site past its cap; nothing was charged."""

    code = "budget-exhausted"


class LedgerError(UserError):
    """The ledger cannot be read, trusted or written; nothing may be trained."""

    code = "ledger-corrupt"


@dataclass
class _Entries:
    """The ledger as read under the lock: its lines, how many bytes they fill, and the last line's hash."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    num_bytes: int = 0
    sha256: str = FIRST_HASH

    def head(self) -> dict[str, Any]:
        """What `head.json` says about these lines."""
        return {"num_bytes": self.num_bytes, "sha256": self.sha256}

    def add(self, line: bytes) -> None:
        """Take the next line; raises where it does not follow from the one before."""
        entry = json.loads(line)
        if entry.pop("previous") != self.sha256 or not line.endswith(b"\n"):
            raise ValueError("Expected the hash of the line before.")
        self.lines.append(entry)
        self.num_bytes += len(line)
        self.sha256 = hashlib.sha256(line).hexdigest()

    def charges(self) -> list[dict[str, Any]]:
        """The lines that charge a release, each with the SHA-256 of its reply once that is committed."""
        charges: list[dict[str, Any]] = []
        for line in self.lines:
            if line["kind"] == "charge":
                charges.append({**line, "reply": None})
            else:
                charges[line["charge"]]["reply"] = line["reply"]
        return charges

    def releases(self) -> list[Release]:
        """Everything charged, committed or not."""
        return [Release(**charge["release"]) for charge in self.charges()]


class Ledger:
    """The ledger in a folder, which is made on first use.

    Guarantees:
        A release is charged and on the disk before `reserve` returns, and never taken back, not even where the training
        failed or the server dropped the reply. Processes that reserve at once cannot pass the cap together. A message
        that is repeated costs nothing: before its commit nothing has left the site, after it the same bytes leave.
        Not covered: another ledger over the same patients, and runs without privacy, which are not charged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reserved: dict[tuple[str, int], int] = {}  # this object's charges, by their number in the ledger

    def reserve(self, run_id: str, server_round: int, release: Release, delta: float, cap: float) -> None:
        """Charge a release; without effect where the same one is charged for this run and round but not committed.

        Args:
            run_id: The server's name of the run.
            server_round: Round of that run.
            release: What the site is about to release.
            delta: At which epsilon is computed.
            cap: Epsilon over the life of the ledger, this release included.

        Raises:
            BudgetExhausted: The sum would exceed the cap.
            LedgerError: The ledger was damaged, or cannot be written.
        """
        wanted = {"run_id": run_id, "round": server_round, "release": asdict(release)}
        with self._locked() as entries:
            for number, charge in enumerate(entries.charges()):
                if charge["reply"] is None and all(charge[key] == value for key, value in wanted.items()):
                    self._reserved[run_id, server_round] = number
                    return
            releases = entries.releases()
            spent, _ = epsilon([*releases, release], delta)
            if not spent <= cap:
                raise BudgetExhausted(f"{self.folder}: expected epsilon <= {cap:g} after this release, got {spent:.4g}")
            terms = {"delta": delta, "epsilon": _json_number(spent), "cap": _json_number(cap)}
            self._append(entries, {"kind": "charge", **wanted, **terms})
            self._reserved[run_id, server_round] = len(releases)

    def commit(self, run_id: str, server_round: int, reply: bytes) -> None:
        """Keep the reply to what this object reserved; only after this may it leave the site.

        Raises:
            ValueError: This object reserved nothing for the round, or another process has committed its reply.
            LedgerError: The ledger was damaged, or cannot be written.
        """
        number = self._reserved.pop((run_id, server_round), None)
        with self._locked() as entries:
            if number is None or entries.charges()[number]["reply"] is not None:
                raise ValueError(f"Expected a charge without a reply for round {server_round}, got none.")
            sha256 = hashlib.sha256(reply).hexdigest()
            _write_privately(self.folder / REPLIES_NAME / sha256, reply)
            self._append(entries, {"kind": "commit", "charge": number, "reply": sha256})

    def cached_reply(self, run_id: str, server_round: int, release: Release | None = None) -> bytes | None:
        """The newest committed reply of this run and round; None where there is none or its file is gone.

        Args:
            run_id: The server's name of the run.
            server_round: Round of that run.
            release: Where given, only a reply to this very release.

        Raises:
            LedgerError: The ledger was damaged.
        """
        with self._locked() as entries:
            for charge in reversed(entries.charges()):
                same = (charge["run_id"], charge["round"]) == (run_id, server_round)
                if same and charge["reply"] and (release is None or charge["release"] == asdict(release)):
                    path = self.folder / REPLIES_NAME / charge["reply"]
                    reply = path.read_bytes() if path.is_file() else b""
                    return reply if hashlib.sha256(reply).hexdigest() == charge["reply"] else None
        return None

    def releases(self) -> list[Release]:
        """Everything that was ever charged, oldest first."""
        with self._locked() as entries:
            return entries.releases()

    def spent(self, delta: float) -> float:
        """Epsilon of everything that was ever charged."""
        return epsilon(self.releases(), delta)[0]

    @contextmanager
    def _locked(self) -> Iterator[_Entries]:
        """The ledger's lines, while no other process can change them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_mode & stat.S_IWOTH:
                raise LedgerError(f"{self.folder}: expected a folder that others cannot write; mend with 'chmod o-w'")
            with (self.folder / LOCK_NAME).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self._read()
        except OSError as error:
            raise LedgerError(f"{self.folder}: expected a ledger that can be read and written, got {error}") from error

    def _read(self) -> _Entries:
        """Check every line against the one before it and against the head."""
        path, head_path = self.folder / LEDGER_NAME, self.folder / HEAD_NAME
        if not path.exists() and not head_path.exists():
            return _Entries()
        try:
            head = json.loads(head_path.read_bytes())
            entries = _parse(path.read_bytes() if path.exists() else b"", head)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise LedgerError(
                f"{self.folder}: expected the ledger as it was last written, but it was edited, cut or removed, so "
                f"what this site has spent is unknown; restore {LEDGER_NAME} and {HEAD_NAME} as of its last run"
            ) from None
        if entries.head() != head:  # interrupted between a line and its head
            self._write_head(entries.head())
        return entries

    def _append(self, entries: _Entries, entry: dict[str, Any]) -> None:
        """Write one line, then the head, each on the disk before the next."""
        line = (json.dumps({**entry, "previous": entries.sha256}, allow_nan=False) + "\n").encode()
        if not entries.lines:
            self._write_head(entries.head())
        descriptor = os.open(self.folder / LEDGER_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.truncate(entries.num_bytes)  # what an interrupted write left behind
            file.seek(entries.num_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        entries.add(line)
        self._write_head(entries.head())

    def _write_head(self, head: dict[str, Any]) -> None:
        _write_privately(self.folder / HEAD_NAME, json.dumps(head).encode())


def _parse(content: bytes, head: dict[str, Any]) -> _Entries:
    """The lines of a ledger; raises unless they form a chain that contains the head.

    Lines after the head are charges whose head was not written any more: they count. A last piece without a line's end
    was being written when the power failed: nobody was told of it, so nothing was trained on it.
    """
    entries, contains_head = _Entries(), False
    for line in content.splitlines(keepends=True):
        contains_head = contains_head or entries.head() == head
        if contains_head and not line.endswith(b"\n"):
            break
        entries.add(line)
    if not contains_head and entries.head() != head:
        raise ValueError("Expected the head in the chain.")
    entries.releases()
    return entries


def _write_privately(path: Path, content: bytes) -> None:
    """Replace a file by its new content, on the disk when this returns, for this user's eyes only."""
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomically(path, content, mode=0o600)


def _json_number(value: float) -> float | None:
    """A number for strict JSON; None for infinity."""
    return value if math.isfinite(value) else None
