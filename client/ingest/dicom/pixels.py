"""The pixels of MR images: every transfer syntax that scanners and archives write, to one form (PS3.5, 8 and A.4)."""

import math
import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from fedcmr.client.ingest.dicom.elements import Elements, wanted
from fedcmr.client.ingest.dicom.header import Header, PixelFormat
from fedcmr.client.ingest.dicom.parser import (
    EXPLICIT_BIG_ENDIAN,
    ITEM,
    MAX_ELEMENTS_IN_ALL,
    SEQUENCE_END,
    UNDEFINED,
    Parsed,
    open_plain,
)
from fedcmr.client.ingest.reasons import Unusable

MAX_ROWS, MAX_FRAMES = 4096, 10_000
END_OF_IMAGE = b"\xff\xd9"
"""EOI of JPEG and JPEG-LS, EOC of JPEG 2000."""
MAX_VOXELS = 2**28
"""Voxels of the largest stack: 512 x 512 pixels, 20 slices and 50 phases."""
NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", EXPLICIT_BIG_ENDIAN})
DECODERS = {
    "1.2.840.10008.1.2.5": "pylibjpeg",  # RLE
    "1.2.840.10008.1.2.4.50": "gdcm",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "gdcm",  # JPEG extended, 12 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # JPEG lossless, process 14
    "1.2.840.10008.1.2.4.70": "gdcm",  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": "pyjpegls",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": "pylibjpeg",  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": "pylibjpeg",  # HTJ2K
}
"""pydicom's plug-in for each encapsulated transfer syntax: the same one at every site, so that pixels are the same."""
FORMAT_ELEMENTS = wanted(
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "NumberOfFrames",
    "RescaleSlope",
    "RescaleIntercept",
)


def pixel_format(parsed: Parsed, rows: int, columns: int) -> PixelFormat:
    """How the pixels of a file are stored, checked against its size.

    Elements that follow from others may be missing: HighBit, BitsStored, and SamplesPerPixel of a monochrome image.

    Raises:
        Unusable: They are not grey values, are cut or too long, or no installed decoder reads them.
    """
    elements, syntax = parsed.elements, parsed.transfer_syntax
    photometric = elements.text("PhotometricInterpretation").upper()
    num_samples = _number(elements, "SamplesPerPixel", 1)
    if num_samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable("not-grayscale" if photometric or num_samples != 1 else "unreadable-pixels")
    allocated = _number(elements, "BitsAllocated")
    stored = _number(elements, "BitsStored", allocated)
    high_bit = _number(elements, "HighBit", stored - 1)
    representation = _number(elements, "PixelRepresentation")
    num_frames = _number(elements, "NumberOfFrames", 1) or 1  # some write 0 in single images
    if num_frames > MAX_FRAMES:
        raise Unusable("too-large")
    if (
        allocated not in (8, 16, 32)
        or not 1 <= stored <= high_bit + 1 <= allocated
        or representation not in (0, 1)
        or num_frames < 1
        or parsed.pixel_offset == 0
    ):
        raise Unusable("unreadable-pixels")
    if syntax in NATIVE:
        expected = num_frames * rows * columns * allocated // 8
        # Padding may follow (PS3.5, 8.1.1, note 1), but no further frame: then NumberOfFrames would be wrong.
        if parsed.pixel_bytes is None or not 0 <= parsed.pixel_bytes - expected < rows * columns * allocated // 8:
            raise Unusable("unreadable-pixels")
        if parsed.pixel_offset + expected > parsed.file_bytes or (syntax == EXPLICIT_BIG_ENDIAN and allocated == 8):
            raise Unusable("unreadable-pixels")
    elif not _can_decode(syntax):
        raise Unusable("no-decoder")
    elif parsed.pixel_bytes is not None:
        raise Unusable("unreadable-pixels")
    slope, intercept = rescale(elements) or (1.0, 0.0)
    return PixelFormat(syntax, photometric, allocated, stored, high_bit, representation, slope, intercept, num_frames)


def rescale(elements: Elements) -> tuple[float, float] | None:
    """RescaleSlope and RescaleIntercept, None where there are none.

    Raises:
        Unusable: They are no numbers, or would map everything to one value.
    """
    if not elements.has("RescaleSlope") and not elements.has("RescaleIntercept"):
        return None
    slope, intercept = (
        elements.number(keyword) if elements.has(keyword) else default
        for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    # Elements.number has excluded what is infinite or absurd; products with 32-bit values stay finite.
    if slope == 0 or math.isnan(slope) or math.isnan(intercept):
        raise Unusable("unreadable-pixels")
    return slope, intercept


def read_pixels(image: Header) -> NDArray[np.float32]:
    """One image, rescaled (PS3.3 C.7.6.1 and C.11.1.1.2), white is bright; shape (Rows, Columns).

    Raises:
        Unusable: It cannot be decoded.
    """
    pixels = np.empty((image.Rows, image.Columns), np.float32)
    _read_file([image], [pixels])
    return pixels


def read_grid(images: Sequence[Sequence[Header]]) -> NDArray[np.float32]:
    """The pixels of a stack, `images[z][t]` -> shape (T, Z, Rows, Columns); every file is opened once.

    Raises:
        Unusable: One cannot be decoded, or they are too many.
    """
    first = images[0][0]
    shape = len(images[0]), len(images), first.Rows, first.Columns
    if math.prod(shape) > MAX_VOXELS:
        raise Unusable("too-large")
    grid = np.empty(shape, np.float32)
    files: dict[Path, list[tuple[Header, NDArray[np.float32]]]] = defaultdict(list)
    for z, t in np.ndindex(shape[1], shape[0]):
        files[images[z][t].path].append((images[z][t], grid[t, z]))
    for members in files.values():
        _read_file(*zip(*members, strict=True))
    return grid


def _read_file(images: Sequence[Header], targets: Sequence[NDArray[np.float32]]) -> None:
    """Images of one file into arrays of shape (Rows, Columns)."""
    try:
        descriptor = open_plain(images[0].path)
    except Unusable:
        raise Unusable("unreadable-pixels") from None
    try:
        frames: list[list[tuple[int, int]]] | None = None
        for image, target in zip(images, targets, strict=True):
            form = image.pixel_format
            assert form is not None, "a header from a file"
            if form.TransferSyntaxUID in NATIVE:
                cells = _native(descriptor, image, form)
            else:
                if frames is None:
                    frames = _frames(descriptor, image.pixel_offset, form.NumberOfFrames)
                cells = _encapsulated(descriptor, image, form, frames[image.frame or 0])
            if cells.shape != (image.Rows, image.Columns):
                raise Unusable("unreadable-pixels")
            _store(cells, form, target)
    except (OSError, struct.error):
        raise Unusable("unreadable-pixels") from None
    finally:
        os.close(descriptor)


def _native(descriptor: int, image: Header, form: PixelFormat) -> NDArray[np.generic]:
    """The cells of an image that is stored as it is."""
    num_bytes = image.Rows * image.Columns * form.BitsAllocated // 8
    raw = os.pread(descriptor, num_bytes, image.pixel_offset + (image.frame or 0) * num_bytes)
    if len(raw) != num_bytes:
        raise Unusable("unreadable-pixels")
    order = ">" if form.TransferSyntaxUID == EXPLICIT_BIG_ENDIAN else "<"
    return np.frombuffer(raw, f"{order}u{form.BitsAllocated // 8}").reshape(image.Rows, image.Columns)


def _encapsulated(
    descriptor: int, image: Header, form: PixelFormat, fragments: Sequence[tuple[int, int]]
) -> NDArray[np.generic]:
    """The cells of an image that is compressed, from its fragments in the file."""
    stream = b"".join(os.pread(descriptor, length, start) for start, length in fragments)
    description: dict[str, Any] = {
        "rows": image.Rows,
        "columns": image.Columns,
        "samples_per_pixel": 1,
        "number_of_frames": 1,
        "bits_allocated": form.BitsAllocated,
        "bits_stored": form.BitsStored,
        "pixel_keyword": "PixelData",
        "photometric_interpretation": form.PhotometricInterpretation,
        "pixel_representation": form.PixelRepresentation,
    }
    decoder, plugin = get_decoder(form.TransferSyntaxUID), DECODERS[form.TransferSyntaxUID]
    try:
        buffer = encapsulate([stream], has_bot=False)
        cells, _ = decoder.as_array(buffer, index=0, raw=True, decoding_plugin=plugin, **description)
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException:
        # Whatever a damaged stream provokes in a decoder, a panic of the one written in Rust included, which is no
        # Exception; its own words may quote the stream.
        raise Unusable("unreadable-pixels") from None
    return cells


def _frames(descriptor: int, position: int, num_frames: int) -> list[list[tuple[int, int]]]:
    """Start and length of the fragments of each frame (PS3.5, A.4).

    A frame may be in several. Then the offset table says where frames begin; without one a frame ends where the
    fragment ends in a codec's end of image, as it does for the JPEG family.

    Raises:
        Unusable: Fragments and frames do not agree.
    """
    table, *fragments = _fragments(descriptor, position)
    if num_frames == 1 and fragments:
        return [fragments]
    if len(fragments) == num_frames:
        return [[fragment] for fragment in fragments]
    starts = {start - 8 - (table[0] + table[1]): index for index, (start, _) in enumerate(fragments)}
    offsets = np.frombuffer(os.pread(descriptor, table[1], table[0]), "<u4").tolist() if table[1] % 4 == 0 else []
    if offsets:
        bounds = [starts.get(offset, -1) for offset in offsets]
    else:
        ends = [index + 1 for index, one in enumerate(fragments) if _ends_an_image(descriptor, *one)]
        bounds = [0, *ends[:-1]]
    if len(bounds) != num_frames or bounds[0] != 0 or any(b <= a for a, b in pairwise(bounds)):
        raise Unusable("unreadable-pixels")
    return [fragments[a:b] for a, b in pairwise([*bounds, len(fragments)])]


def _ends_an_image(descriptor: int, start: int, length: int) -> bool:
    """Whether a fragment's last bytes are the end marker of a JPEG stream, padded or not."""
    tail = os.pread(descriptor, min(length, 4), start + max(length - 4, 0))
    return tail.rstrip(b"\0").endswith(END_OF_IMAGE)


def _fragments(descriptor: int, position: int) -> list[tuple[int, int]]:
    """Start and length of the offset table, which may be empty, and of each fragment (PS3.5, A.4)."""
    fragments: list[tuple[int, int]] = []
    for _ in range(MAX_ELEMENTS_IN_ALL):
        group, number, length = struct.unpack("<HHI", os.pread(descriptor, 8, position))
        tag = group << 16 | number
        if tag == SEQUENCE_END:
            if not fragments:
                break
            return fragments
        if tag != ITEM or length == UNDEFINED:
            raise Unusable("unreadable-pixels")
        fragments.append((position + 8, length))
        position += 8 + length
    raise Unusable("unreadable-pixels")


def _store(cells: NDArray[np.generic], form: PixelFormat, target: NDArray[np.float32]) -> None:
    """Cells of BitsAllocated -> what they mean: of BitsStored up to HighBit, signed or not, rescaled, white is bright.

    Bits beyond are not the image's (PS3.5, 8.1.1): scanners once kept overlays there.
    """
    width = cells.dtype.itemsize * 8
    if cells.dtype.kind not in "ui" or width < form.BitsStored:
        raise Unusable("unreadable-pixels")
    bits = cells.astype(f"{'i' if form.PixelRepresentation else 'u'}{width // 8}", copy=False)
    if width > form.BitsStored:
        # Up to the highest bit and down again: the second shift brings the sign along. A decoder may give fewer bits
        # than were allocated; then HighBit does not say where they are.
        above = width - 1 - form.HighBit if width == form.BitsAllocated else width - form.BitsStored
        bits = (bits << above) >> (width - form.BitsStored)
    target[...] = bits
    if (form.RescaleSlope, form.RescaleIntercept) != (1.0, 0.0):
        target *= np.float32(form.RescaleSlope)
        target += np.float32(form.RescaleIntercept)
    if form.PhotometricInterpretation == "MONOCHROME1":
        np.negative(target, out=target)


@lru_cache(maxsize=64)
def _can_decode(syntax: str) -> bool:
    """Whether the plug-in for an encapsulated transfer syntax is installed."""
    return syntax in DECODERS and DECODERS[syntax] in get_decoder(syntax).available_plugins


def _number(elements: Elements, keyword: str, default: int | None = None) -> int:
    """A whole number.

    Raises:
        Unusable: It is none, or missing without a default.
    """
    if default is not None and not elements.has(keyword):
        return default
    value = elements.number(keyword)
    if math.isnan(value) or value != int(value):
        raise Unusable("unreadable-pixels")
    return int(value)
