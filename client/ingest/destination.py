"""The folder that `prepare` fills: opened with its settings, and saved so that a crash costs seconds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmr.client.ingest.burned_in import SUSPECTED
from fedcmr.shared.case import INDEX_NAME, CaseInfo, load_case, read_index, write_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.provenance import PRIVATE_REAL

REFUSED_NAME = "refused.json"
DETAILS_NAME = "details.json"
FROM_FILES = "provenance_from_files"
"""In `prepared.json`: nobody said where the scans come from, so that it depends on what all of them say."""


@dataclass(frozen=True)
class Destination:
    """A folder of cases that is being filled.

    Attributes:
        folder: Where it is.
        known: Rows of the cases that are there, by pseudonym; grows as they are made.
        details: Their entries of `details.json`.
        record: What `prepared.json` says. Where the files decide on the provenance it says private, and so it stays
            until all cases have been read.
    """

    folder: Path
    known: dict[str, CaseInfo]
    details: dict[str, dict[str, Any]]
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], vendor: str | None) -> "Destination":
        """Make the folder, or resume in one with the same settings.

        Args:
            folder: Where.
            settings: What all of its cases have in common.
            vendor: The vendor of scans that name none, if somebody gives it; is noted and may differ from call to call.

        Raises:
            UserError: It holds something else, or was made with other settings.
        """
        path = folder / PREPARED_NAME
        if folder.exists() and not path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty and was not made by 'prepare': choose another destination")
        known: dict[str, CaseInfo] = {}
        details: dict[str, dict[str, Any]] = {}
        given: set[str] = set()
        if (folder / INDEX_NAME).exists():
            earlier = {"provenance": PRIVATE_REAL.as_json(), **read_json(path)}
            if FROM_FILES not in earlier:
                settings.pop(FROM_FILES, None)  # it was given on the command line, or the files were not read
            elif settings["provenance"] == PRIVATE_REAL.as_json():
                earlier["provenance"] = PRIVATE_REAL.as_json()  # what files say is no statement
            different = [name for name in settings if name != FROM_FILES and earlier.get(name) != settings[name]]
            if different:
                names = ", ".join(different)
                raise UserError(f"{folder} was prepared with another {names}: choose another destination")
            given = set(earlier.get("vendors_given", []))
            infos = read_index(folder)
            there = [i for i in infos if (folder / "cases" / f"{i.pseudonym}.npz").is_file()]
            known = {i.pseudonym: i if i.contours else _with_contours(folder, i) for i in there}
            if (folder / DETAILS_NAME).exists():
                details = {name: entry for name, entry in read_json(folder / DETAILS_NAME).items() if name in known}
        private_folder(folder)
        record = {**settings, "vendors_given": sorted(given | ({vendor} if vendor else set()))}
        write_json(path, record)
        return cls(folder, known, details, record)

    def remove_suspected(self) -> None:
        """Take out what was kept although its scans seem to show letters: nobody says that they were seen."""
        for name in [one for one in self.known if SUSPECTED in self.details.get(one, {}).get("warnings", [])]:
            (self.folder / "cases" / f"{name}.npz").unlink(missing_ok=True)
            del self.known[name], self.details[name]

    def save(self) -> None:
        """Write the index, and before it what it leads to; nothing where there never was a case."""
        if self.known or (self.folder / INDEX_NAME).exists():
            write_json(self.folder / DETAILS_NAME, self.details)
            write_index(self.folder, list(self.known.values()))


def _with_contours(folder: Path, info: CaseInfo) -> CaseInfo:
    """The row with what its masks are, which an earlier version did not write; as it is where the case is damaged."""
    try:
        return load_case(folder, info).info
    except UserError:
        return info


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file that an earlier call wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: choose another destination")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
