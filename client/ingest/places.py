"""Where scans lie and what they call their patient: for the site's own list of what was refused, and nowhere else."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a study, a series or a file lies, as the files themselves say; empty where they do not.

    Attributes:
        path: The file, or the folder that holds all files.
        patient: The patient's number or name, spelt as there.
        accession: AccessionNumber (0008,0050), by which an archive finds a study.
        study: StudyInstanceUID.
    """

    path: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)
    accession: str = field(default="", repr=False)
    study: str = field(default="", repr=False)


class Tally(Counter[str]):
    """Counts by reason code that also know where each thing counted lies.

    Attributes:
        places: Code and place of everything that was counted, in the order it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[tuple[str, Place]] = []

    def add(self, code: str, place: Place | Path | str) -> None:
        """Count one study, series or file."""
        self[code] += 1
        self.places.append((code, place if isinstance(place, Place) else Place(str(place))))

    def add_all(self, other: "Tally", study: Place | None = None) -> None:
        """Count what another tally has, each where it lies; with a study, as parts of that study."""
        for code, place in other.places:
            self.add(code, place if study is None else replace(study, path=place.path))


def common_folder(paths: Iterable[Path | str]) -> str:
    """The deepest folder that holds all files; of one file the file itself, of none an empty text."""
    known = sorted({str(path) for path in paths})
    return known[0] if len(known) == 1 else os.path.commonpath([Path(path).parent for path in known]) if known else ""
