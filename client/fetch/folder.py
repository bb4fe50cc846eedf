"""The folder that cases arrive in: what is whole stays whole, and the same request resumes where it stopped.

DIR/cases/NAME.npz    each appears at once
DIR/arrived.jsonl     while cases come: a line for each that is there
DIR/fetch.json        what was requested; the folder of another request is refused
DIR/cases.csv, DATASHEET.md, SHA256SUMS    at the end: without cases.csv no command takes the folder for a whole one
"""

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedcmr.shared.case import INDEX_NAME, CaseInfo, write_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import CHECKSUMS_NAME, DATASHEET_NAME

REQUEST_NAME, JOURNAL_NAME = "fetch.json", "arrived.jsonl"


class ReceivedCases:
    """A folder that is being filled; `with` keeps a second process out.

    Attributes:
        count: Cases that are there.
        last: Pseudonym of the last one; empty where there is none.
        done: Whether all have come.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]):
        """Open it, or make it.

        Args:
            folder: New, empty, or of the same request.
            request: What JSON can hold: study, release, selection.

        Raises:
            UserError: It holds something else, or another process fills it.
        """
        self._folder, self._request = folder, dict(request)
        self.count, self.last = 0, ""
        known = self._known()
        self.done = bool(known.get("done"))
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        if not known:
            self._note(done=False)
        self._journal: TextIO = (folder / JOURNAL_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise UserError(f"{folder} is being filled by another process: wait for it") from None
        if not self.done:
            self._take_stock()

    def __enter__(self) -> "ReceivedCases":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            (self._folder / JOURNAL_NAME).unlink(missing_ok=True)
        self._journal.close()

    def keep(self, info: CaseInfo, content: bytes, sha256: str) -> None:
        """Write a case that was validated, whole or not at all, and note it."""
        path = self._path(info.pseudonym)
        partial = path.with_suffix(".partial")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._journal.write(json.dumps({"info": asdict(info), "sha256": sha256}) + "\n")
        self._journal.flush()
        self.count, self.last = self.count + 1, info.pseudonym

    def finish(self, datasheet: str) -> None:
        """Write index, datasheet and checksums: the folder is a data set like any other one now."""
        infos, sums = [], {}
        for _, line in self._lines():
            info = CaseInfo(**line["info"])
            infos.append(info)
            sums[f"cases/{info.pseudonym}.npz"] = line["sha256"]
        write_index(self._folder, infos, private=False)
        write_atomically(self._folder / DATASHEET_NAME, datasheet.encode(), private=False)
        for name in (INDEX_NAME, DATASHEET_NAME):
            sums[name] = hashlib.sha256((self._folder / name).read_bytes()).hexdigest()
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_atomically(self._folder / CHECKSUMS_NAME, text.encode(), private=False)
        self._note(done=True)
        self.done = True

    def _known(self) -> dict[str, Any]:
        """The request that the folder belongs to; empty for a new one."""
        path = self._folder / REQUEST_NAME
        if not path.exists():
            if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
                raise UserError(f"{self._folder} holds other files: give a new or empty folder")
            return {}
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} cannot be read: give a new or empty folder") from None
        if "fresh" in known:  # as version 0.1 noted it
            known["num_on_demand"] = known.pop("fresh")
        for key, value in self._request.items():
            if known.get(key) != value:
                raise UserError(
                    f"{self._folder} is of another request ({key} is {known.get(key)!r} there, {value!r} "
                    "now): give a new or empty folder"
                )
        return known

    def _note(self, done: bool) -> None:
        text = json.dumps({**self._request, "done": done}, indent=2)
        write_atomically(self._folder / REQUEST_NAME, text.encode(), private=False)

    def _take_stock(self) -> None:
        """Count what is there, up to the first case whose file is not the one that came; resume from there.

        A power cut may leave a line without its file's content.
        """
        whole = 0
        for text, line in self._lines():
            try:
                name = str(line["info"]["pseudonym"])
                if hashlib.sha256(self._path(name).read_bytes()).hexdigest() != line["sha256"]:
                    break
            except OSError:
                break
            whole += len(text)
            self.count, self.last = self.count + 1, name
        self._journal.truncate(whole)
        self._journal.seek(0, 2)

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """The journal's whole lines, as they stand (ASCII) and as read; one that was cut off ends it."""
        self._journal.seek(0)
        lines = []
        for text in self._journal:
            try:
                lines.append((text, json.loads(text)))
            except json.JSONDecodeError:
                break
            if not text.endswith("\n"):
                return lines[:-1]
        return lines

    def _path(self, pseudonym: str) -> Path:
        return self._folder / "cases" / f"{pseudonym}.npz"
