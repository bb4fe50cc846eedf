"""The site's own list of what was refused or passed over: which study, why, what to do, and where it lies.

It names patients as the scans do, so it lies apart from the cases, in `DST/private`, for the site's account alone. No
part of fedcmr but `fedcmr-client` opens that folder, and copies of prepared cases are made without it.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedcmr.client.ingest.places import Place, Tally, common_folder
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PRIVATE_NAME
from fedcmr.shared.permissions import private_folder

LIST_NAME, SOURCES_NAME = f"{PRIVATE_NAME}/refused.csv", f"{PRIVATE_NAME}/sources.json"
"""In a prepared folder: the list, and the folders of scans that it was prepared from."""
COLUMNS = ("what", "reason", "what it means, and what to do", "patient", "accession", "study", "path", "files")
REFUSED, NOT_FETCHED, LEFT_OUT, TABLE_ROW = KINDS = ("study refused", "not fetched", "left out", "row of the table")
"""What a line of the list is about, in the order in which it tells them: what is worth the effort comes first."""
FORMULA = re.compile(r"(^|[,;|\t\"'])(?=\s*[-=+@\uff0d\uff1d\uff0b\uff20])")
"""Where a spreadsheet would begin a formula (OWASP, CSV injection), also one that splits cells at another separator."""
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of controls, formats, surrogates, and separators of lines and paragraphs."""


class Row(NamedTuple):
    """One line of the list.

    Attributes:
        what: One of `KINDS`.
        code: Of `REASONS`.
        place: Whose it is, and where.
        number: How many studies or files it stands for.
    """

    what: str
    code: str
    place: Place
    number: int = 1


def rows_of(refused: Tally, left_out: Tally) -> list[Row]:
    """The lines for what was counted.

    Files that were left out share a line where reason, study and folder are one: an export may hold thousands of them.

    Args:
        refused: Studies.
        left_out: Files and series.
    """
    assert all(len(tally.places) == tally.total() for tally in (refused, left_out)), "counted, and placed nowhere"
    studies = [Row(REFUSED, code, place) for code, place in refused.places]
    return [*studies, *(Row(LEFT_OUT, *group) for group in _by_folder(left_out))]


def write_list(destination: Path, source: Path, refused: Tally, left_out: Tally, unused_rows: Tally) -> None:
    """Write the list of what `prepare` found in a folder of scans.

    Args:
        destination: The prepared folder.
        source: The scans; paths are told from there.
        refused: Studies.
        left_out: Files and series.
        unused_rows: Patients whom only the table of ejection fractions names.
    """
    rows = [*rows_of(refused, left_out), *(Row(TABLE_ROW, code, place) for code, place in unused_rows.places)]
    write_rows(destination, (row._replace(place=_seen_from(source, row.place)) for row in rows))


def write_rows(destination: Path, rows: Iterable[Row]) -> None:
    """Write `destination/private/refused.csv` anew, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for what, code, place, number in sorted(rows, key=_order):
        told = (place.patient, place.accession, place.study, place.path)
        writer.writerow([what, code, REASONS[code], *map(plain_text, told), number])
    private_folder(destination / PRIVATE_NAME)
    write_atomically(destination / LIST_NAME, text.getvalue().encode("utf-8-sig"))  # the mark is for Excel


def plain_text(text: str) -> str:
    """A text of the scans for a cell, with a quotation mark where a spreadsheet would begin a formula."""
    return FORMULA.sub(r"\1'", printable(text))


def printable(text: str) -> str:
    """A text of the scans without signs that move a cursor, turn the line around or are half a character."""
    return "".join(" " if unicodedata.category(sign) in HIDDEN else sign for sign in text)


def remember_source(destination: Path, source: Path) -> None:
    """Note the folder of scans, for `fedcmr-client whois`."""
    known = sources_of(destination)
    if source.resolve() not in known:
        private_folder(destination / PRIVATE_NAME)
        text = json.dumps([os.fsdecode(path) for path in (*known, source.resolve())], indent=1)
        write_atomically(destination / SOURCES_NAME, (text + "\n").encode())


def sources_of(destination: Path) -> list[Path]:
    """The folders of scans that calls of `prepare` for a folder have read; empty where none is noted.

    Raises:
        UserError: The note is damaged.
    """
    path = destination / SOURCES_NAME
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return [Path(one) for one in known]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and give 'whois' the folder with --source") from None


def _by_folder(left_out: Tally) -> Iterator[tuple[str, Place, int]]:
    """Places with the number of files that share reason, study and folder."""
    groups: dict[tuple[str, Place, Path], list[Place]] = {}
    for code, place in left_out.places:
        key = code, Place("", place.patient, place.accession, place.study), Path(place.path).parent
        groups.setdefault(key, []).append(place)
    for (code, study, _), places in groups.items():
        path = common_folder(place.path for place in places if place.path)
        yield code, Place(path, study.patient, study.accession, study.study), len(places)


def _order(row: Row) -> tuple[int, str, str, str, str]:
    """By kind, reason and place."""
    return KINDS.index(row.what), row.code, row.place.path, row.place.patient, row.place.study


def _seen_from(source: Path, place: Place) -> Place:
    """A place with its path as it is seen from the folder of scans."""
    if not place.path or not Path(place.path).is_relative_to(source):
        return place
    return replace(place, path=os.path.relpath(place.path, source))
