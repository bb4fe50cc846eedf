"""The allowed elements of a DICOM data set and what their values mean (PS3.5, 6.2: value representations)."""

import math
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pydicom.charset import decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword

MAX_NUMBER = 1e7
"""No millimetre, millisecond, tesla or count of an image is larger."""
BINARY = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Wanted = Mapping[int, Any]
"""Tags to keep; for a sequence the tags of its items, None for any other element."""


def tag_of(keyword: str) -> int:
    """The tag of a DICOM keyword, as one number."""
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag


def wanted(*keywords: str, **sequences: Wanted) -> Wanted:
    """An allow-list from keywords, and from sequences with the lists of their items."""
    return {tag_of(word): None for word in keywords} | {tag_of(word): inner for word, inner in sequences.items()}


class Elements:
    """The allowed elements of a data set or of one item of a sequence."""

    __slots__ = ("encodings", "endian", "values")

    def __init__(self, endian: str, encodings: list[str]) -> None:
        self.endian, self.encodings = endian, encodings
        self.values: dict[int, tuple[bytes, Any]] = {}

    def text(self, keyword: str) -> str:
        """A text without its padding; empty where there is none, or one that is no text."""
        vr, value = self.values.get(_TAGS[keyword], (b"", b""))
        if vr in BINARY or not isinstance(value, bytes):
            return ""
        text = value.decode("latin-1")
        if not value.isascii() or b"\x1b" in value:
            # An identifier in another alphabet is the same one in all its encodings.
            with suppress(LookupError, ValueError):
                decoded = decode_bytes(value, self.encodings, set())
                # Two that cannot be decoded must not become the same one.
                text = text if REPLACEMENT in decoded else decoded
        return text.strip(" \0\t\r\n")

    def codes(self, keyword: str) -> tuple[str, ...]:
        """The values of a code string (CS) in capitals; of anything else none."""
        values = tuple(word.strip().upper() for word in self.text(keyword).split("\\"))
        fit = all(len(word) <= 16 and (not word or _is_code(word)) for word in values)
        return values if fit and len(values) <= 10 and any(values) else ()

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        """Exactly `count` numbers, or None where they are missing, damaged, not finite or beyond `MAX_NUMBER`."""
        vr, value = self.values.get(_TAGS[keyword], (b"", b""))
        if not isinstance(value, bytes):
            return None
        form = BINARY.get(vr)
        try:
            if form is not None:
                numbers = tuple(map(float, struct.unpack(f"{self.endian}{count}{form}", value)))
            else:
                numbers = tuple(map(_decimal, value.split(b"\\")))
        except (ValueError, struct.error):
            return None
        # A comparison with NaN is false.
        return numbers if len(numbers) == count and all(abs(x) <= MAX_NUMBER for x in numbers) else None

    def number(self, keyword: str) -> float:
        """One number, or NaN."""
        numbers = self.numbers(keyword, 1)
        return math.nan if numbers is None else numbers[0]

    def has(self, keyword: str) -> bool:
        """Whether there is a value, whatever it is."""
        vr, value = self.values.get(_TAGS[keyword], (b"", b""))
        # Zero bytes are a number, and the padding of a text.
        return bool(value.strip(b" \0") if isinstance(value, bytes) and vr not in BINARY else value)

    def items(self, keyword: str) -> list["Elements"]:
        """The items of a sequence."""
        value = self.values.get(_TAGS[keyword], (b"", None))[1]
        return value if isinstance(value, list) else []


def _decimal(text: bytes) -> float:
    """A decimal or integer string; Python also reads what they may not hold, such as underscores."""
    if b"_" in text:
        raise ValueError
    return float(text.strip(b" \0"))


def _is_code(word: str) -> bool:
    """Whether only capitals, digits, spaces and underscores occur (PS3.5, 6.2, CS)."""
    return word.replace("_", "").replace(" ", "").isalnum() and word.isascii()


class _Tags(dict[str, int]):
    """Tags by keyword, looked up once."""

    def __missing__(self, keyword: str) -> int:
        self[keyword] = tag_of(keyword)
        return self[keyword]


class _Vrs(dict[int, bytes]):
    """VRs of the standard by tag, looked up once."""

    def __missing__(self, tag: int) -> bytes:
        self[tag] = dictionary_VR(tag)[:2].encode()  # "US or SS" is unsigned
        return self[tag]


_TAGS, STANDARD_VRS = _Tags(), _Vrs()
