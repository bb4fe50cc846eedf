"""What a site answered, told to its own people as it happens, from its own ledger and `errors.log`."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedcmr.client.error_log import LOG_NAME, entries_of
from fedcmr.client.ledger import CHARGE, COMMIT, LEDGER_NAME
from fedcmr.client.policy import SiteSettings
from fedcmr.client.refusals import in_words
from fedcmr.shared.adapters import present_name

POLL_S = 1.0


class Answers:
    """Follows a site's files from where they end now.

    Args:
        site: The site.
        tell: Takes one line.
    """

    def __init__(self, site: SiteSettings, tell: Callable[[str], None]) -> None:
        self._errors = site.folder / LOG_NAME
        self._ledgers = {
            site.ledger_path / LEDGER_NAME: "round {round} of run {run_id}: {task}",
            site.test_ledger_path / LEDGER_NAME: "evaluation on test patients, run {run_id}",
        }
        self._tell = tell
        self._ends = {path: _size(path) for path in (self._errors, *self._ledgers)}
        self._charges: dict[Path, list[dict[str, Any]]] = {path: [] for path in self._ledgers}
        for path in self._ledgers:
            self._charges[path] = [entry for entry in _entries(_read(path, 0)) if entry.get("kind") == CHARGE]

    def follow(self, over: threading.Event) -> None:
        """Tell until `over` is set."""
        while not over.wait(POLL_S):
            for line in self.new():
                self._tell(line)

    def new(self) -> Iterator[str]:
        """What was answered since the last call, in words."""
        for note in entries_of(self._appended(self._errors)):
            kind = "a rehearsed request" if note.rehearsed else "a request"
            yield f"refused {kind}: {in_words(note.code)}"
        for path, words in self._ledgers.items():
            for entry in _entries(self._appended(path)):
                if entry.get("kind") == CHARGE:
                    self._charges[path].append(entry)
                elif entry.get("kind") == COMMIT and entry["charge"] < len(self._charges[path]):
                    charge = self._charges[path][entry["charge"]]
                    spent = "without bound" if charge["epsilon"] is None else f"{charge['epsilon']:.2f}"
                    what = words.format(**{**charge, "task": present_name(charge["task"])})
                    yield f"answered {what}; epsilon spent so far {spent}"

    def _appended(self, path: Path) -> str:
        """The whole lines that were added to a file; all of it where it is another, smaller one now."""
        end = self._ends[path] if _size(path) >= self._ends[path] else 0
        text = _read(path, end)
        whole = text[: text.rfind("\n") + 1]
        self._ends[path] = end + len(whole.encode(errors="surrogateescape"))
        return whole


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="surrogateescape")
    except OSError:
        return ""


def _entries(text: str) -> Iterator[dict[str, Any]]:
    """The lines of a ledger that can be read; whether it can be trusted is `fedcmr.client.ledger`'s to say."""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
