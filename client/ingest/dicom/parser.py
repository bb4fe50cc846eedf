"""The allowed elements of a DICOM file, found without reading the others (PS3.5, 7: data elements and sequences).

A parser of its own, for three reasons: what is not on the list stays on the disk; nesting, counts and lengths are
bounded before anything is allocated; and a header takes a quarter of the time of one in which every element becomes an
object. It follows pydicom where files break the rules in known ways: a transfer syntax that does not say how the data
set is written, elements with implicit VR among explicit ones, sequences of unknown VR.
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from pydicom.charset import convert_encodings

from fedcmr.client.ingest.dicom.elements import STANDARD_VRS, Elements, Wanted, tag_of, wanted
from fedcmr.client.ingest.reasons import Unusable

MAX_FILE_BYTES = 2**32
MAX_ELEMENTS = 5_000
"""In one data set or item; scanners write some 300."""
MAX_ELEMENTS_IN_ALL = 1_000_000
"""With all items: an Enhanced file of 1,000 frames has 100,000."""
MAX_DEPTH = 16
"""Deepest nesting of sequences; scanners write up to six."""
MAX_VALUE_BYTES = 1024
"""Longest value of an allowed element; the longest in use, ten values of 16 characters, has 170 bytes."""
WINDOW_BYTES = 2**14
LAST_IDENTIFYING = 0x0070
"""The first element of a data set is SpecificCharacterSet, ImageType or another that names the object, up to the
manufacturer; of the file meta information its length or version."""
ARCHIVE_MARKS = (b"PK\3\4", b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b")
"""How zip, 7z, rar and gzip begin."""

DEFLATED = frozenset(
    {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)
"""Transfer syntaxes in which a small file may expand a thousandfold (PS3.5, A.5, A.11 and those with JPIP)."""
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""With a length of 32 bits (PS3.5, 7.1.2)."""
KNOWN_VRS = LONG_VRS | {
    b"AE",
    b"AS",
    b"AT",
    b"CS",
    b"DA",
    b"DS",
    b"DT",
    b"FL",
    b"FD",
    b"IS",
    b"LO",
    b"LT",
    b"PN",
    b"SH",
    b"SL",
    b"SS",
    b"ST",
    b"TM",
    b"UI",
    b"UL",
    b"US",
}
UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END, PIXEL_DATA = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0x7FE00010
META = wanted("TransferSyntaxUID", "MediaStorageSOPClassUID")
CHARACTER_SET = tag_of("SpecificCharacterSet")


@dataclass(frozen=True)
class Parsed:
    """What was found in a file.

    Attributes:
        elements: Allowed elements of the data set.
        transfer_syntax: A UID as written in the file meta information, or what stands for a missing one.
        media_class: MediaStorageSOPClassUID of the file meta information.
        pixel_offset: Byte at which the value of PixelData starts; 0 without one.
        pixel_bytes: Its length; None for encapsulated fragments.
        file_bytes: Size of the whole file.
    """

    elements: Elements
    transfer_syntax: str
    media_class: str
    pixel_offset: int
    pixel_bytes: int | None
    file_bytes: int


def open_plain(path: Path | str) -> int:
    """A descriptor of a plain file, or of one that a link leads to, never of something that waits for a writer.

    Raises:
        Unusable: It is none, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unusable("unreadable") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unusable("no-regular-file")
    return descriptor


def parse(path: Path | str, allowed: Wanted) -> Parsed:
    """Find the allowed elements of a file up to its pixels.

    Raises:
        Unusable: It is no DICOM file, is damaged, or exceeds a limit.
    """
    descriptor = open_plain(path)
    try:
        return _Parser(descriptor, os.fstat(descriptor).st_size).parse(allowed)
    except OSError:
        raise Unusable("unreadable") from None
    except struct.error:  # it ends where an element was expected
        raise Unusable("damaged-header") from None
    finally:
        os.close(descriptor)


class _Parser:
    """One pass over a file, through a window that moves on as far as it must."""

    def __init__(self, descriptor: int, file_bytes: int) -> None:
        self.descriptor, self.file_bytes = descriptor, file_bytes
        self.window, self.base = b"", 0
        self.num_elements = 0
        self.pixels: tuple[int, int | None] = 0, 0

    def parse(self, allowed: Wanted) -> Parsed:
        if self.file_bytes > MAX_FILE_BYTES:
            raise Unusable("too-large")
        if self.bytes_at(128, 4) == b"DICM":
            return self._parse_from(132, allowed)
        if self.bytes_at(0, 8).startswith(ARCHIVE_MARKS):
            raise Unusable("archive")
        begin = 4 if self.bytes_at(0, 4) == b"DICM" else 0
        if not self._begins_a_data_set(begin):
            raise Unusable("not-dicom")
        try:
            parsed = self._parse_from(begin, allowed)
        except (Unusable, struct.error):
            raise Unusable("not-dicom") from None  # nothing but its first bytes looked like a data set
        if not parsed.elements.text("SOPInstanceUID"):
            raise Unusable("not-dicom")
        return parsed

    def _begins_a_data_set(self, position: int) -> bool:
        """Whether a file without the preamble of PS3.10, 7.1 begins with an element of group 0002 or 0008.

        Scanners and archives once wrote the data set alone, and every toolkit reads it.
        """
        head = self.bytes_at(position, 12)
        if len(head) < 12:
            return False
        for endian in "<>":
            group, number = struct.unpack_from(f"{endian}HH", head)
            length = struct.unpack_from(f"{endian}I", head, 4)[0]
            explicit = head[4:6] in KNOWN_VRS
            plausible = number <= LAST_IDENTIFYING and (explicit or (endian == "<" and length <= MAX_VALUE_BYTES))
            if group in (2, 8) and plausible:
                return True
        return False

    def _parse_from(self, begin: int, allowed: Wanted) -> Parsed:
        """The file meta information from a byte on, where there is any, and the data set."""
        meta, start = self._file_meta(begin)
        syntax = meta.text("TransferSyntaxUID")
        if syntax in DEFLATED:
            raise Unusable("deflated")
        if not syntax and self.bytes_at(start, 2) == b"\0\10":  # group 0008, written big endian
            syntax = EXPLICIT_BIG_ENDIAN
        self.endian = ">" if syntax == EXPLICIT_BIG_ENDIAN else "<"
        # The first element decides: some files are not written as their meta information says.
        explicit = self.bytes_at(start + 4, 2) in KNOWN_VRS
        self.encodings = ["iso8859"]
        elements, _ = self._data_set(start, self.file_bytes, allowed, explicit, 0)
        if not syntax:
            syntax = "1.2.840.10008.1.2.1" if explicit else "1.2.840.10008.1.2"
        return Parsed(elements, syntax, meta.text("MediaStorageSOPClassUID"), *self.pixels, self.file_bytes)

    def bytes_at(self, position: int, count: int) -> bytes:
        """`count` bytes, fewer at the end of the file."""
        index = position - self.base
        if index < 0 or index + count > len(self.window):
            self.window, self.base = os.pread(self.descriptor, max(count, WINDOW_BYTES), position), position
            index = 0
        return self.window[index : index + count]

    def _file_meta(self, position: int) -> tuple[Elements, int]:
        """Group 0002, always explicit VR little endian (PS3.10, 7.1), and where the data set starts."""
        self.endian, self.encodings = "<", ["iso8859"]
        elements = Elements("<", self.encodings)
        while self.bytes_at(position, 2) == b"\2\0":
            tag, vr, length, start = self._element(position, explicit=True)
            if tag in META:
                self._keep(elements, tag, vr, start, length)
            position = start + length
            if position > self.file_bytes:
                raise Unusable("damaged-header")
        return elements, position

    def _element(self, position: int, explicit: bool) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty where it is implicit), length and start of the value of the element at `position`."""
        self.num_elements += 1
        if self.num_elements > MAX_ELEMENTS_IN_ALL:
            raise Unusable("too-large")
        head = self.bytes_at(position, 12)
        group, number = struct.unpack_from(f"{self.endian}HH", head)
        vr = head[4:6]
        if group == 0xFFFE or not explicit or not (vr.isalpha() and vr.isupper()):
            length = struct.unpack_from(f"{self.endian}I", head, 4)[0]
            return group << 16 | number, b"", length, position + 8
        if vr in LONG_VRS:
            return group << 16 | number, vr, struct.unpack_from(f"{self.endian}I", head, 8)[0], position + 12
        return group << 16 | number, vr, struct.unpack_from(f"{self.endian}H", head, 6)[0], position + 8

    def _data_set(self, position: int, end: int, allowed: Wanted, explicit: bool, depth: int) -> tuple[Elements, int]:
        """The elements up to `end`, to the end of the item, or at the top to PixelData; and where that was."""
        if depth > MAX_DEPTH:
            raise Unusable("too-large")
        elements = Elements(self.endian, self.encodings)
        for _ in range(MAX_ELEMENTS):
            if position >= end:
                return elements, position
            tag, vr, length, start = self._element(position, explicit)
            if tag == ITEM_END:
                return elements, start
            if tag == PIXEL_DATA and depth == 0:
                self.pixels = start, None if length == UNDEFINED else length
                return elements, start
            inner = allowed.get(tag)
            if length == UNDEFINED:
                # A sequence of unknown VR holds elements with implicit VR (PS3.5, 6.2.2, note 2).
                items, position = self._items(start, end, inner, explicit and vr != b"UN", depth)
            else:
                position = start + length
                if position > end:
                    raise Unusable("damaged-header")
                if inner is not None:
                    items, _ = self._items(start, position, inner, explicit and vr != b"UN", depth)
                elif tag in allowed:
                    self._keep(elements, tag, vr, start, length)
            if inner is not None:
                elements.values[tag] = b"SQ", items
        raise Unusable("too-large")

    def _items(
        self, position: int, end: int, allowed: Wanted | None, explicit: bool, depth: int
    ) -> tuple[list[Elements], int]:
        """The items of a sequence up to `end` or its delimiter, and where that was; unwanted ones are passed over."""
        items: list[Elements] = []
        while position < end:
            tag, _, length, start = self._element(position, explicit)
            if tag == SEQUENCE_END:
                return items, start
            if tag != ITEM:
                raise Unusable("damaged-header")
            if length == UNDEFINED or allowed is not None:
                inner_end = end if length == UNDEFINED else start + length
                if inner_end > end:
                    raise Unusable("damaged-header")
                item, position = self._data_set(start, inner_end, allowed or {}, explicit, depth + 1)
                if allowed is not None:
                    items.append(item)
            else:
                position = start + length
        if position > end:
            raise Unusable("damaged-header")
        return items, position

    def _keep(self, elements: Elements, tag: int, vr: bytes, start: int, length: int) -> None:
        """Read a value; its own VR stands where the file does not say it."""
        if length > MAX_VALUE_BYTES:
            raise Unusable("too-large")
        value = self.bytes_at(start, length)
        if len(value) < length:
            raise Unusable("damaged-header")
        elements.values[tag] = vr if vr and vr != b"UN" else STANDARD_VRS[tag], value
        if tag == CHARACTER_SET:
            self.encodings[:] = _encodings(value)


def _encodings(value: bytes) -> list[str]:
    """Python's names for SpecificCharacterSet; what is unknown reads as Latin-1, which maps every byte."""
    try:
        return convert_encodings([word.decode("ascii").strip() for word in value.split(b"\\")])
    except (LookupError, ValueError):
        return ["iso8859"]
