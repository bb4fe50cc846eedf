"""`errors.log` in a site's folder: what went wrong, for the site's own people. It never leaves the site.

Whoever sends requests decides how often something goes wrong, so the log has a size: an entry that is there already is
noted by a line, and a full log moves to `errors.log.1` over the one before.
"""

import fcntl
import hashlib
import re
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcmr.shared.permissions import private_opener

LOG_NAME, EARLIER_NAME = "errors.log", "errors.log.1"
MAX_BYTES = 512 * 1024
"""Size of each of the two files."""
MAX_ENTRY_CHARS = 8 * 1024
ENTRY = re.compile(r"(\d{4}-\d\d-\d\dT\S+) (.+) \[[0-9a-f]{12}\](?: again)?")
REHEARSAL = "rehearsal: "
"""In front of the code of a request that was only rehearsed."""


@dataclass(frozen=True)
class Entry:
    """One line of the log that begins an entry.

    Attributes:
        time: UTC, as ISO 8601.
        code: The code that was sent, or what went wrong in words.
        rehearsed: Whether the request was only rehearsed.
    """

    time: str
    code: str
    rehearsed: bool


def entries_of(text: str) -> list[Entry]:
    """The entries in a piece of the log, oldest first."""
    found = (ENTRY.fullmatch(line) for line in text.splitlines())
    return [
        Entry(match[1], match[2].removeprefix(REHEARSAL), match[2].startswith(REHEARSAL)) for match in found if match
    ]


def read_entries(folder: Path) -> list[Entry]:
    """All entries of a site's two logs, oldest first."""
    paths = [folder / EARLIER_NAME, folder / LOG_NAME]
    return [
        entry
        for path in paths
        if path.is_file()
        for entry in entries_of(path.read_text(encoding="utf-8", errors="replace"))
    ]


def note(folder: Path, code: str) -> None:
    """Append the exception being handled, if there is one, under a code; for this account's eyes only.

    Raises:
        OSError: The log cannot be written.
    """
    text = traceback.format_exc() if traceback.format_exc() != "NoneType: None\n" else ""
    if len(text) > MAX_ENTRY_CHARS:  # the end of a traceback says what happened, its beginning where
        text = f"{text[: MAX_ENTRY_CHARS // 4]}\n[...]\n{text[-MAX_ENTRY_CHARS * 3 // 4 :]}"
    mark = f"[{hashlib.sha256((code + text).encode(errors='backslashreplace')).hexdigest()[:12]}]"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    path = folder / LOG_NAME
    with open(path, "a+b", opener=private_opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = file.read(MAX_BYTES + 1)
        entry = f"{time} {code} {mark} again\n" if f"{mark}\n".encode() in known else f"{time} {code} {mark}\n{text}\n"
        content = entry.encode(errors="backslashreplace")
        if len(known) + len(content) > MAX_BYTES:
            _move_away(path, known)
            file.truncate(0)
            content = f"{time} {code} {mark}\n{text}\n".encode(errors="backslashreplace")
        file.write(content)


def _move_away(path: Path, content: bytes) -> None:
    """Keep what was in the log. The log itself stays the same file: another process may wait for its lock."""
    partial = path.with_name(f"{EARLIER_NAME}.partial")
    with open(partial, "wb", opener=private_opener) as file:
        file.write(content)
    partial.replace(path.with_name(EARLIER_NAME))
