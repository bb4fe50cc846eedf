"""What happens to files on their way: bytes that change, headers that lie, tables that somebody edited."""

import gzip
import random
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

from nibabel.nifti1 import header_dtype as nifti1_fields
from nibabel.nifti2 import header_dtype as nifti2_fields

LENGTHS = (0, 1, 2, 7, 0xFF, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
NUMBERS = (b"nan", b"1e400", b"-1e308", b"0", b"-0", b"inf", b"\\\\", b"1_0", b"\xff\xfe", b"9" * 16)
PLACES = (b"DICM", b"\x08\x00", b"\x10\x00", b"\x18\x00", b"\x20\x00", b"\x28\x00", b"\xfe\xff\x00\xe0", b"\xe0\x7f")
"""Near them lie lengths, representations and values: groups, items, pixels."""
GZIP = b"\x1f\x8b"
NIFTI_SIZES = {348: nifti1_fields, 540: nifti2_fields}
"""By the length of the header, which stands in its first four bytes."""
WHOLE = (0, 1, -1, 2, 3, 7, 8, 16, 64, 127, 255, 511, 512, 768, 1024, 2304, 0x7FFF, -0x8000, 0x7FFFFFFF, 2**63 - 1)
REAL = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-6, 0.5, 352.0, 540.0, 1e6, 3.4e38, -3.4e38, float("inf"), float("nan"))
CELLS = (
    "",
    " ",
    "0",
    "-1",
    "1e400",
    "nan",
    "-inf",
    "1_0",
    "1,5",
    "0x1f",
    "1" * 20,
    "9" * 5000,
    "\u0665\u0665",
    "\u00b2",
    "=1+1",
    "@SUM(A1)",
    "-",
    "null",
    "true",
    "[]",
    "{}",
    "[" * 20_000,
    "../..",
    "/",
    "a\0b",
    "\ud7ff\u202e",
    "u\u0308",
    '"',
    '""',
    "'",
    "A" * 140_000,
    "Siemens",
    "UNKNOWN",
    "0000",
)
"""What stands where a value is expected."""
SEPARATORS = (",", ";", "\t", "|", " ", ":", "\n", "\r", "\r\n", "\u2028", "\0", '"', "[", "]", "{", "}")
ENCODINGS = ("utf-16", "utf-16-le", "utf-8-sig", "latin-1", "cp037")

Change = Callable[[bytearray, Sequence[bytes], random.Random], None]


def damage(content: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to four changes, of the kinds that a file of this content can suffer.

    A compressed file is damaged as it lies there, or unpacked and packed again.

    Args:
        content: The file; NIfTI, DICOM or text shows in it.
        others: Contents of other files, parts of which may get into this one.
        rng: Decides every byte.
    """
    if content[:2] == GZIP:
        if rng.random() < 0.4:
            return _changed(content, others, rng, BYTES)
        return gzip.compress(damage(gzip.decompress(content), others, rng), 1, mtime=0)
    if is_text(content):
        return _changed(content, others, rng, TEXT)
    return _changed(content, others, rng, (*BYTES, *((_set_field,) * len(BYTES) if _fields(content) else ())))


def is_text(content: bytes) -> bool:
    """Whether people read it: a table, a list of points, settings."""
    with suppress(UnicodeDecodeError):
        return "\0" not in content.decode()
    return False


def _changed(content: bytes, others: Sequence[bytes], rng: random.Random, changes: Sequence[Change]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not changed:
            break
        rng.choice(changes)(changed, others, rng)
    return bytes(changed)


# bytes: flipped, set, cut, doubled, lost or foreign


def _place(content: bytearray, rng: random.Random) -> int:
    """Half of all places lie where the structure is, near something that begins an element; the others anywhere."""
    if rng.random() < 0.5:
        found = content.find(rng.choice(PLACES), rng.randrange(len(content)))
        if found >= 0:
            return min(found + rng.randrange(12), len(content) - 1)
    if rng.random() < 0.5:
        return rng.randrange(min(len(content), 2000))
    return rng.randrange(len(content))


def _flip(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    for _bit in range(rng.choice((1, 2, 16))):
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def _set_bytes(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    content[at : at + rng.choice((1, 2, 4))] = rng.randbytes(rng.choice((1, 2, 4)))


def _set_length(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at, value = _place(content, rng), rng.choice(LENGTHS)
    wide = struct.pack(rng.choice("<>") + "I", value)
    content[at : at + 4] = wide if rng.random() < 0.5 else wide[:2]


def _set_number(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at, number = _place(content, rng), rng.choice(NUMBERS)
    content[at : at + len(number)] = number


def _cut(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    del content[_place(content, rng) :]


def _lose(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    del content[at : at + rng.choice((1, 2, 8, 200))]


def _double(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at = _place(content, rng)
    part = content[at : at + rng.choice((2, 8, 200, 2000))]
    content[at:at] = part * rng.choice((1, 1, 40))


def _splice(content: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other))
    at = _place(content, rng)
    content[at:] = other[start:]


BYTES: tuple[Change, ...] = (
    _flip,
    _flip,
    _flip,
    _set_bytes,
    _set_length,
    _set_number,
    _cut,
    _lose,
    _double,
    _splice,
)


# NIfTI headers


def _fields(content: bytes | bytearray) -> tuple[str, list[tuple[str, str, int]]]:
    """Byte order, and the fields of a NIfTI header as (name, type, offset), a place of an array each; none without."""
    for order in "<>":
        size = struct.unpack_from(order + "i", content)[0] if len(content) >= 4 else 0
        if size in NIFTI_SIZES and len(content) >= size:
            found = []
            for name in NIFTI_SIZES[size].names or ():
                kind, offset = NIFTI_SIZES[size].fields[name][:2]
                step = kind.base.itemsize
                found += [(name, kind.base.char, offset + i * step) for i in range(kind.itemsize // step)]
            return order, [field for field in found if field[1] in FORMATS]
    return "", []


FORMATS = {"h": "h", "i": "i", "l": "q", "q": "q", "f": "f", "d": "d", "B": "B"}
"""NumPy's characters for numbers and those of `struct`."""
GEOMETRY = ("dim", "pixdim", "vox_offset", "scl_slope", "scl_inter", "datatype", "bitpix", "qform_code", "sform_code")


def _set_field(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    """A number of the header that is no longer true: axes, voxels, offset, scaling, affine."""
    order, fields = _fields(content)
    if not fields:  # an earlier change took the header
        return
    if rng.random() < 0.5:
        fields = [field for field in fields if field[0] in GEOMETRY]
    kind, offset = rng.choice(fields)[1:]
    form = order + FORMATS[kind]
    if kind in "fd":
        struct.pack_into(form, content, offset, rng.choice(REAL))
    else:
        bits = 8 * struct.calcsize(form)
        value = rng.choice(WHOLE) % 2**bits
        struct.pack_into(form, content, offset, value if kind == "B" or value < 2 ** (bits - 1) else value - 2**bits)


# text


def _pieces(content: bytearray, separators: str, rng: random.Random) -> tuple[str, list[str]]:
    """The text around one of the separators that occur in it."""
    text = content.decode(errors="surrogateescape")
    separator = rng.choice([one for one in separators if one in text] or ["\n"])
    return separator, text.split(separator)


def _put(content: bytearray, text: str) -> None:
    content[:] = text.encode(errors="surrogateescape")


def _set_cell(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    lines = content.decode(errors="surrogateescape").split("\n")
    at = rng.randrange(len(lines))
    separator = rng.choice([one for one in ",;\t :" if one in lines[at]] or [","])
    cells = lines[at].split(separator)
    cells[rng.randrange(len(cells))] = rng.choice(CELLS)
    lines[at] = separator.join(cells)
    _put(content, "\n".join(lines))


def _lose_piece(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    separator, pieces = _pieces(content, "\n,;\t :", rng)
    del pieces[rng.randrange(len(pieces))]
    _put(content, separator.join(pieces))


def _double_piece(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    separator, pieces = _pieces(content, "\n,;\t :", rng)
    at = rng.randrange(len(pieces))
    pieces[at:at] = [pieces[at]] * rng.choice((1, 1, 1000))
    _put(content, separator.join(pieces))


def _swap_pieces(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    separator, pieces = _pieces(content, "\n,;\t :", rng)
    one, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    pieces[one], pieces[other] = pieces[other], pieces[one]
    _put(content, separator.join(pieces))


def _other_separator(content: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    _, pieces = _pieces(content, "\n,;\t :", rng)
    _put(content, rng.choice(SEPARATORS).join(pieces))


def _insert(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(content))
    content[at:at] = rng.choice((*CELLS, *SEPARATORS)).encode()


def _encode(content: bytearray, _: Sequence[bytes], rng: random.Random) -> None:
    with suppress(UnicodeError):
        content[:] = content.decode().encode(rng.choice(ENCODINGS))


TEXT: tuple[Change, ...] = (
    _set_cell,
    _set_cell,
    _set_cell,
    _lose_piece,
    _double_piece,
    _swap_pieces,
    _other_separator,
    _insert,
    _encode,
    _flip,
    _set_bytes,
    _cut,
    _lose,
    _splice,
)
