"""Tables that a data manager writes: CSV files whose every mistake is named by its line, never by its value."""

import csv
import errno
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import read_plain

MAX_BYTES = 16 * 2**20
FORMULA_MARKS = ("=", "+", "@", "\t", "\r")
"""What a spreadsheet would run, as in "=cmd|..." (OWASP, CSV injection). A minus sign may begin a number."""
SEPARATOR_LINE = re.compile(r"sep=[,;\t]\r?\n", re.IGNORECASE)
MIN_EF, MAX_EF = 0.02, 0.95
"""Outside of these a left ventricle's ejection fraction is a typing error, or per cent taken for a fraction."""


WHOLE = re.compile(r"([0-9]{1,9})(?:[.,]0*)?")


def read_rows(
    path: Path, aliases: Mapping[str, Sequence[str]], required: Sequence[str]
) -> list[tuple[int, dict[str, str]]]:
    """The known columns of a CSV file, row by row; all other columns are dropped unseen.

    Comma, semicolon and tab are told apart by the first line that is not Excel's `sep=;`. Empty rows are skipped.

    Args:
        path: UTF-8, with or without a byte order mark.
        aliases: From the name of a column to the ways a first line may spell it, in lower case.
        required: Columns that must be there.

    Returns:
        The line's number in the file, from 1, and the stripped cells by column.

    Raises:
        UserError: The file cannot be read, a column is missing or named twice, or a cell begins like a formula.
    """
    try:
        text = read_plain(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise UserError(
                f"{path} is larger than {MAX_BYTES // 2**20} MiB: expected a table with a row per patient"
            ) from None
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            raise UserError(f"{path}: expected a table, got something that is not a regular file") from None
        raise UserError(f"{path} cannot be read as UTF-8 text: save it again as 'CSV UTF-8'") from None
    marked = SEPARATOR_LINE.match(text)  # which Excel writes and reads
    first = text[marked.end() if marked else 0 :].partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    columns: dict[str, int] = {}
    try:
        for cells in reader:
            line = reader.line_num
            if marked and line == 1:
                continue
            if not columns:
                columns = _columns(path, cells, aliases, required)
            elif any(cell.strip() for cell in cells):
                if len(cells) <= max(columns.values()):
                    raise UserError(
                        f"{path} line {line}: expected {max(columns.values()) + 1} or more cells, got {len(cells)}"
                    )
                row = {name: cells[index].strip() for name, index in columns.items()}
                for name, cell in row.items():
                    if cell.startswith(FORMULA_MARKS):
                        raise UserError(f"{path} line {line}: column {name} begins like a formula: enter plain text")
                rows.append((line, row))
    except csv.Error:
        raise UserError(f"{path} line {reader.line_num} is not a CSV row: a quotation mark may be missing") from None
    if not rows:
        raise UserError(f"{path} has no rows: expected a first line with {', '.join(required)}, then a row per patient")
    return rows


def _columns(
    path: Path, cells: Sequence[str], aliases: Mapping[str, Sequence[str]], required: Sequence[str]
) -> dict[str, int]:
    """Where each known column stands."""
    header = [cell.strip().lower() for cell in cells]
    columns: dict[str, int] = {}
    for name, spellings in aliases.items():
        found = [index for index, cell in enumerate(header) if cell in spellings]
        if len(found) > 1:
            raise UserError(f"{path} line 1: two columns mean {name}: keep one")
        if found:
            columns[name] = found[0]
        elif name in required:
            raise UserError(f"{path} line 1: expected a column {name} (one of {', '.join(spellings)})")
    return columns


def plain_number(text: str, place: str) -> float:
    """A finite number with a decimal point.

    Args:
        text: The cell.
        place: "FILE line N: column NAME", for the message.

    Raises:
        UserError: It is empty, has a decimal comma, or is no finite number.
    """
    if not text:
        raise UserError(f"{place} is empty: enter a number or leave out the row")
    if "," in text:
        raise UserError(f"{place} has a comma: write the number with a decimal point")
    try:
        # Not all that Python reads as a number was meant as one: 1_000, or the digits of other scripts.
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place} is not a finite number")
    return value


def whole_number(text: str) -> int | None:
    """A number from 0 that has no fraction, however it is written: 5, 5.0 or 5,0; None for any other text.

    Programs write whole numbers with a fraction of zero once one row of their column is empty.
    """
    match = WHOLE.fullmatch(text.strip())
    return None if match is None else int(match[1])


def ejection_fraction(text: str, place: str, *, percent: bool) -> float:
    """An ejection fraction as a fraction.

    Raises:
        UserError: It is no number, or none that a ventricle can have in the unit that the column's name says.
    """
    value = plain_number(text, place)
    ef = value / 100 if percent else value
    if not MIN_EF <= ef <= MAX_EF:
        scale, unit = (100, "per cent") if percent else (1, "a fraction")
        raise UserError(f"{place} is out of range: expected {unit} from {MIN_EF * scale:g} to {MAX_EF * scale:g}")
    return ef
