"""Which studies are asked for: `--query date=2020-01..2023-12 vendor=Siemens description=cardiac,heart list=FILE`."""

import calendar
import csv
import datetime
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedcmr.shared.case import VENDORS
from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import MIB, read_plain

MAX_LIST_BYTES = 16 * MIB
MAX_WINDOW_DAYS = 31
"""Many archives cut off what they answer after some hundred studies, and say nothing."""
UID = re.compile(r"[0-9]+(\.[0-9]+){3,}")
MAX_UID_LENGTH = 64
NUMBER = re.compile(r"[^\\*?\x00-\x1f]{1,64}")
"""An accession number; `*`, `?` and `\\` would match others too (PS3.4, C.2.2.2)."""
COLUMNS = {"accessionnumber": "AccessionNumber", "studyinstanceuid": "StudyInstanceUID", "studyuid": "StudyInstanceUID"}
"""Headings of a CSV in small letters, without what stands between words."""
EXPECTED = "date=2020-01-01..2023-12-31, vendor=Siemens,Philips, description=cardiac,heart or list=FILE"


@dataclass(frozen=True)
class Query:
    """What a study has to be.

    Attributes:
        first: Earliest StudyDate; likewise `last`. None where the list alone decides.
        vendors: Of the scanner, of `fedcmr.shared.case.VENDORS`; empty for any.
        words: Of which the description holds one, in any capitals; empty for any.
        listed: (keyword, value) pairs: accession numbers or study UIDs. None for any study of the dates.
    """

    first: datetime.date | None = None
    last: datetime.date | None = None
    vendors: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    listed: tuple[tuple[str, str], ...] | None = field(default=None, repr=False)

    def matches(self) -> Iterator[Mapping[str, str]]:
        """Questions that together find every study, none about more than a month."""
        if self.listed is not None:
            for keyword, value in self.listed:
                yield {keyword: value}
            return
        assert self.first is not None and self.last is not None
        start = self.first
        while start <= self.last:
            end = min(start + datetime.timedelta(days=MAX_WINDOW_DAYS - 1), self.last)
            yield {"StudyDate": f"{start:%Y%m%d}-{end:%Y%m%d}"}
            start = end + datetime.timedelta(days=1)

    def takes(self, study: Mapping[str, str]) -> bool:
        """Whether a study that the archive names fits: not every archive looks at all that it is asked for.

        Args:
            study: Its StudyDate and StudyDescription.
        """
        date = study.get("StudyDate", "").replace(".", "")
        if self.first is not None and self.last is not None:
            dates = f"{self.first:%Y%m%d}", f"{self.last:%Y%m%d}"
            if date and not dates[0] <= date <= dates[1]:
                return False
        description = study.get("StudyDescription", "").casefold()
        return not self.words or any(word in description for word in self.words)


def parse_query(parts: Sequence[str]) -> Query:
    """The query that a command line gives as KEY=VALUE.

    Raises:
        UserError: A part means nothing, or all of them leave the whole archive.
    """
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in ("date", "vendor", "description", "list") or not value.strip():
            raise UserError(f"--query: expected {EXPECTED}, got {part!r}")
        if key in given:
            raise UserError(f"--query: expected {key}= once, several values with commas between them")
        given[key] = value.strip()
    first, last = _dates(given["date"]) if "date" in given else (None, None)
    if first is None and "list" not in given:
        raise UserError("--query: expected date= or list=, which keep the whole archive from being asked for")
    vendors = frozenset(one.strip() for one in given.get("vendor", "").split(",") if one.strip())
    if not vendors <= set(VENDORS):
        raise UserError(f"--query vendor=: expected of {', '.join(VENDORS)}, got {given['vendor']!r}")
    words = tuple(one.strip().casefold() for one in given.get("description", "").split(",") if one.strip())
    listed = read_list(Path(given["list"])) if "list" in given else None
    return Query(first, last, vendors, words, listed)


def _dates(text: str) -> tuple[datetime.date, datetime.date]:
    """Both ends of `2020-01-01..2023-12-31`, of a month, a year or a day."""
    first, dots, last = text.partition("..")
    try:
        start, end = _ends(first)[0], _ends(last if dots else first)[1]
    except ValueError:
        raise UserError(
            f"--query date=: expected FROM..TO, each as 2020, 2020-01 or 2020-01-31, got {text!r}"
        ) from None
    if start > end:
        raise UserError(f"--query date=: expected FROM..TO in this order, got {text!r}")
    return start, end


def _ends(text: str) -> tuple[datetime.date, datetime.date]:
    """First and last day of a year, a month or a day; raises ValueError."""
    if not re.fullmatch(r"[0-9]{4}(-?[0-9]{2}(-?[0-9]{2})?)?", text.strip()):
        raise ValueError
    digits = text.strip().replace("-", "")
    year, month, day = int(digits[:4]), int(digits[4:6] or 0), int(digits[6:8] or 0)
    first = datetime.date(year, month or 1, day or 1)
    month = month or 12
    return first, datetime.date(year, month, day or calendar.monthrange(year, month)[1])


def read_list(path: Path) -> tuple[tuple[str, str], ...]:
    """Accession numbers and study UIDs of a file: one a line, or a column of a CSV.

    Raises:
        UserError: It cannot be read, or a line holds neither; says which, without the value.
    """
    try:
        text = read_plain(path, MAX_LIST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: expected a readable text file (UTF-8) of at most {MAX_LIST_BYTES} bytes") from None
    lines = text.splitlines()
    heading = lines[0] if lines else ""
    separator = next((sign for sign in ";\t," if sign in heading), ",")
    names = [re.sub(r"[^a-z]", "", name.lower()) for name in heading.split(separator)]
    known = [(index, COLUMNS[name]) for index, name in enumerate(names) if name in COLUMNS]
    if known:
        # The UID where a table has both: an accession number may stand for several studies.
        index, keyword = max(known, key=lambda column: column[1])
        rows = csv.reader(io.StringIO("\n".join(lines[1:])), delimiter=separator)
        values = [(number, row[index].strip() if index < len(row) else "") for number, row in enumerate(rows, start=2)]
    elif len(names) > 1:
        raise UserError(f"{path}: expected a column AccessionNumber or StudyInstanceUID in its first line")
    else:
        keyword, values = "", [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    entries: dict[tuple[str, str], None] = {}
    for number, value in values:
        if not value or value.startswith("#"):
            continue
        is_uid = UID.fullmatch(value) is not None and len(value) <= MAX_UID_LENGTH
        if not NUMBER.fullmatch(value) or (keyword == "StudyInstanceUID" and not is_uid):
            raise UserError(f"{path}: line {number} holds no {keyword or 'accession number or study UID'}")
        entries[keyword or ("StudyInstanceUID" if is_uid else "AccessionNumber"), value] = None
    if not entries:
        raise UserError(f"{path} lists no study: expected accession numbers or study UIDs, one a line")
    return tuple(entries)
