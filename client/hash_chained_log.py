"""An append-only file of JSON lines in two copies, each line with the SHA-256 of the line before it.

    FILE                  the log
    FILE's folder/lock    locked by whoever reads or writes
    REPLICA               its replica, in another folder and better on another disk

A line counts once it is on the disk in both copies, first in the file, then in the replica. So the replica is never
ahead of the file and never behind by more than the line being written, and it only moves forward: a file that was
edited, cut, removed or taken from an older backup no longer begins with what the replica holds, and is refused. What
only an interruption leaves behind is repaired in passing: one whole line that is not in the replica yet, or the torn
beginning of one, which was never reported.

It cannot notice that both copies were changed alike, taken back to the same older state, or removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder, private_opener

LOCK_NAME = "lock"
FIRST_HASH = "0" * 64
EARLIER_FORMAT = b'{"kind": "charge"'
"""How the files of the first version began, which had no second copy; this one's begin with how they were opened."""


class LedgerError(UserError):
    """The ledger cannot be read, trusted or written; nothing may be trained."""

    code = "ledger-corrupt"


@dataclass
class Lines:
    """The log as read under the lock: its bytes, the entries in them, and the last line's hash."""

    content: bytes = b""
    entries: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = FIRST_HASH

    def follow(self, line: bytes) -> None:
        """Take the next line, but for its bytes: to join them one by one would take the square of their number.

        Raises:
            ValueError: It does not follow from the line before it.
        """
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.pop("previous", None) != self.sha256 or not line.endswith(b"\n"):
            raise ValueError("Expected the hash of the line before.")
        self.entries.append(entry)
        self.sha256 = hashlib.sha256(line).hexdigest()


class HashChainedLog:
    """The log in `path`, with its replica in `replica`; both are made with the first line.

    Guarantees:
        What `append` wrote is on the disk in both copies before it returns. Whoever holds the lock sees every line
        that any process has appended, or a `LedgerError`. Not covered: a change of both copies.
    """

    def __init__(self, path: Path, replica: Path) -> None:
        self.path, self.replica = path, replica
        self._known = Lines()  # as this object last saw it: what was checked then is compared byte for byte, not parsed

    @contextmanager
    def locked(self) -> Iterator[Lines]:
        """The lines, while no other process can change them.

        Raises:
            LedgerError: The copies disagree, or cannot be read and written safely.
        """
        with self._held():
            yield self._read()

    def append(self, lines: Lines, entry: dict[str, Any]) -> None:
        """Write one line, within `locked`."""
        line = (json.dumps({**entry, "previous": lines.sha256}, allow_nan=False) + "\n").encode()
        offset = len(lines.content)
        if offset == 0:  # a file without a replica is refused, so the replica has to be there first
            _write_at(self.replica, 0, b"")
        _write_at(self.path, offset, line)
        _write_at(self.replica, offset, line)
        lines.follow(line)
        lines.content += line

    def repair(self, entry: dict[str, Any]) -> None:
        """Make both copies equal to the longer one, where that one is whole, and append `entry` to tell of it.

        No line of either copy is given up, so nothing that was spent becomes unspent.

        Raises:
            LedgerError: There is no copy that is whole and holds all lines of the other.
        """
        with self._held():
            copies = [content or b"" for content in self._contents()]
            whole = [lines for lines in map(_parse_or_none, copies) if lines is not None and lines.content]
            best = max(whole, key=lambda lines: len(lines.content), default=None)
            # Of a copy that is not whole, the lines can only be counted.
            if best is None or any(
                copy.count(b"\n") > len(best.entries) or (_parse_or_none(copy) and not best.content.startswith(copy))
                for copy in copies
            ):
                raise LedgerError(
                    f"{self.path}: expected one copy that is whole and holds all that the other one ({self.replica}) "
                    "holds, got none; restore one of them from a backup made after the site's last run"
                )
            for path, copy in zip((self.path, self.replica), copies, strict=True):
                if copy != best.content:
                    write_atomically(path, best.content)
            self.append(best, entry)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The lock, on folders that nobody else can write."""
        folder = self.path.parent
        try:
            if not folder.is_dir():
                private_folder(folder)
                _sync_folder(folder.parent)
            if not self.replica.parent.is_dir():
                raise LedgerError(
                    f"{self.replica.parent}: expected the folder of the ledger's second copy, got none; mount or make "
                    "it, or correct 'ledger_replica' in site.yaml"
                )
            if _is_same(self.path, self.replica) or self.replica.resolve().is_relative_to(folder.resolve()):
                raise LedgerError(
                    f"{self.replica}: expected a copy of its own outside the ledger's folder, got {self.path.name} "
                    "once more or a link to it; remove the link, then 'fedcmr-client budget --repair'"
                )
            for path in (folder, self.path, self.replica.parent, self.replica):
                mode = path.stat().st_mode if path.exists() else 0
                # In a sticky folder, such as a shared disk's top, nobody can remove what is another's.
                if mode & stat.S_IWOTH and not (path == self.replica.parent and mode & stat.S_ISVTX):
                    raise LedgerError(
                        f"{path}: expected that others cannot write it; correct it with 'chmod o-w {path}'"
                    )
            with _locked_folder(folder), _locked_file(folder / LOCK_NAME):
                yield
        except OSError as error:
            raise LedgerError(f"{folder}: expected a ledger that can be read and written, got {error}") from error

    def _read(self) -> Lines:
        """Compare both copies and check every line against the one before it."""
        content, second = self._contents()
        if (not content and second == b"") or (content is None and second is None):
            return Lines()
        if second is None:
            raise self._refused(f"its second copy {self.replica} is missing")
        if content is None:
            raise self._refused(f"it is missing, while its second copy {self.replica} is there")
        whole, known = _whole_lines(content), _whole_lines(second)
        if not whole.startswith(known):
            older = known.startswith(whole)
            raise self._refused(f"it {'is older than' if older else 'differs from'} its second copy {self.replica}")
        if whole.count(b"\n") > known.count(b"\n") + 1:
            raise self._refused(f"its second copy {self.replica} is older by several lines")
        # A torn line is the one being written when the power failed: in the file before the replica had it, in the
        # replica after the file had it. Anywhere else it was cut by hand.
        if (len(whole) < len(content) and whole != known) or (len(known) < len(second) and whole == known):
            raise self._refused("its last line is cut")
        lines = _parse_or_none(whole, self._known)
        if lines is None:
            raise self._refused("it was edited")
        self._known = lines
        if second != whole:
            _write_at(self.replica, len(known), whole[len(known) :])
        return lines

    def _contents(self) -> tuple[bytes | None, bytes | None]:
        """The bytes of both copies; None where there is no file."""
        content, second = (path.read_bytes() if path.is_file() else None for path in (self.path, self.replica))
        if content is not None and content.startswith(EARLIER_FORMAT):
            raise LedgerError(
                f"{self.path}: written by an earlier version of fedcmr, which kept no second copy; finish its study "
                "with that version, or name another 'ledger' in site.yaml for patients who are not in this one"
            )
        return content, second

    def _refused(self, what: str) -> LedgerError:
        return LedgerError(
            f"{self.path}: expected the ledger as it was last written, but {what}, so what this site has spent is "
            "unknown; restore both as of the site's last run, or see 'fedcmr-client budget --help' for --repair"
        )


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names lead to one file, by a link of either kind."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """A lock on the folder itself, which nobody can delete while a ledger is in it.

    Some network file systems lock files that are open for writing and nothing else: there the lock file alone counts.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked_file(path: Path) -> Iterator[None]:
    """A lock on the file that has this name when the lock is held: one that was deleted meanwhile locks nothing."""
    while True:
        with open(path, "a", opener=private_opener) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_open_as(file.fileno(), path):
                yield
                return


def _is_open_as(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _parse_or_none(content: bytes, known: Lines | None = None) -> Lines | None:
    """The lines, or None where one does not follow from the one before; those already `known` are not parsed again."""
    if known is None or not content.startswith(known.content):
        known = Lines()
    lines = Lines(entries=list(known.entries), sha256=known.sha256)
    try:
        for line in content[len(known.content) :].splitlines(keepends=True):
            lines.follow(line)
    except (ValueError, RecursionError):
        return None
    lines.content = content
    return lines


def _whole_lines(content: bytes) -> bytes:
    """Without what follows the last line's end."""
    return content[: content.rfind(b"\n") + 1]


def _write_at(path: Path, offset: int, content: bytes) -> None:
    """Replace what follows `offset`, on the disk when this returns, for this user's eyes only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if offset == 0:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put a folder's new names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
