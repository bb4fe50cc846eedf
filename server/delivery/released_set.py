"""A run's released synthetic set as the service reads it: an index in memory, cases from the disk one at a time."""

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedcmr.server.delivery.query import Refusal
from fedcmr.shared.case import INDEX_NAME, CaseInfo, read_index
from fedcmr.shared.delivery.contract import MAX_CASE_BYTES, MAX_CASES, MAX_MESSAGE_BYTES, matches
from fedcmr.shared.delivery.delivery_pb2 import Selection
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import CHECKSUMS_NAME, DATASHEET_NAME


@dataclass(frozen=True)
class Entry:
    """A case of the set.

    Attributes:
        info: Its row of `cases.csv`.
        size: Size of its file in bytes.
        sha256: SHA-256 of its file, as in the release's `SHA256SUMS`.
    """

    info: CaseInfo
    size: int
    sha256: str


@dataclass(frozen=True)
class ReleasedSet:
    """A release that was complete when it was opened.

    Attributes:
        folder: For example RUN/synthetic.
        sha256: SHA-256 of its `SHA256SUMS`.
        datasheet: The text of its DATASHEET.md.
        entries: Sorted by pseudonym.
    """

    folder: Path
    sha256: str
    datasheet: str
    entries: tuple[Entry, ...]

    def select(self, selection: Selection, after: str = "") -> Iterator[Entry]:
        """The matching cases whose pseudonyms sort after `after`, in that order."""
        start = bisect.bisect_right(self.entries, after, key=lambda entry: entry.info.pseudonym)
        return (entry for entry in self.entries[start:] if matches(entry.info, selection))

    def read(self, entry: Entry) -> bytes:
        """Content of a case's file.

        Raises:
            Refusal: It differs from what was released.
        """
        try:
            content = (self.folder / "cases" / f"{entry.info.pseudonym}.npz").read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise Refusal(
                grpc.StatusCode.DATA_LOSS,
                "a case's file is not the one that was released: tell the "
                "coordinator to check the set and to start the service again",
            )
        return content

    def per_vendor(self) -> dict[str, int]:
        """Number of cases by vendor, sorted by name."""
        return dict(sorted(Counter(entry.info.vendor for entry in self.entries).items()))


def open_released_set(folder: Path) -> ReleasedSet:
    """Read a release's index and checksums; its cases are checked when they are sent.

    Raises:
        UserError: The release is incomplete, or cannot be sent.
    """
    again = "write the release again"
    try:
        text = (folder / CHECKSUMS_NAME).read_bytes()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.decode().splitlines())}
        for name in (INDEX_NAME, DATASHEET_NAME):
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sums.get(name):
                raise UserError(f"{folder / name} differs from its line in {CHECKSUMS_NAME}: {again}")
        datasheet = (folder / DATASHEET_NAME).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: finish the run, so that it has a release") from None
    except UnicodeDecodeError:
        raise UserError(f"{folder} is not a release of synthetic cases: {again}") from None
    entries = []
    for info in sorted(read_index(folder), key=lambda info: info.pseudonym):
        path = folder / "cases" / f"{info.pseudonym}.npz"
        digest = sums.get(f"cases/{path.name}")
        if digest is None or not path.is_file():
            raise UserError(f"{path} is missing, or its line in {CHECKSUMS_NAME}: {again}")
        size = path.stat().st_size
        if not 0 < size <= MAX_CASE_BYTES:
            raise UserError(f"{path}: expected a case of at most {MAX_CASE_BYTES} bytes, got {size}")
        entries.append(Entry(info, size, digest))
    if not 0 < len(entries) <= MAX_CASES or len(datasheet.encode()) > MAX_MESSAGE_BYTES // 2:
        raise UserError(
            f"{folder}: expected 1 to {MAX_CASES} cases and a datasheet of at most {MAX_MESSAGE_BYTES // 2} bytes"
        )
    return ReleasedSet(folder, hashlib.sha256(text).hexdigest(), datasheet, tuple(entries))
