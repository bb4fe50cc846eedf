"""A case that came over the network, validated before it is kept: its name, its row, its bytes, its arrays.

The server is the study's, but it may have been broken into. It can give bad images; it cannot write outside the
folder, replace a case that is there, run code, or fill the memory.
"""

import hashlib
import io
import math
import re
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedcmr.shared.case import PSEUDONYM, UNKNOWN, VENDORS, Case, CaseInfo
from fedcmr.shared.delivery.contract import MAX_CASE_BYTES, matches
from fedcmr.shared.delivery.delivery_pb2 import CaseHeader, Selection

SHA256 = re.compile(r"[0-9a-f]{64}")
DTYPES: dict[str, np.dtype[Any]] = {
    "frames": np.dtype(np.float32),
    "masks": np.dtype(np.uint8),
    "spacing_mm": np.dtype(np.float32),
}
MAX_ARRAY_BYTES = 64 * 2**20
"""Unpacked: frames of 16 slices of 128 x 128 pixels take 2.1 MB."""
MAX_HEADER_BYTES = 1024
MAX_FIELD_STRENGTH_T = 30.0


class Untrustworthy(Exception):  # noqa: N818
    """What came is not what a delivery service sends; says how, without repeating what came."""


def expect(condition: bool, text: str) -> None:
    """Raise `Untrustworthy` unless the condition holds."""
    if not condition:
        raise Untrustworthy(text)


def announced(header: CaseHeader, wanted: Selection, last: str) -> CaseInfo:
    """The row of a case that is announced.

    Args:
        header: What came.
        wanted: What was requested.
        last: Pseudonym of the case before: they come in order, so that none comes twice.

    Raises:
        Untrustworthy: The announcement is not one of a case that was requested.
    """
    row = header.row
    expect(PSEUDONYM.fullmatch(row.pseudonym) is not None, "a case whose name is none")
    expect(PSEUDONYM.fullmatch(row.group) is not None, "a case whose group's name is none")
    expect(row.pseudonym > last, "cases out of their order")
    expect(row.vendor in (*VENDORS, UNKNOWN), "a case of an unknown vendor")
    strength = row.field_strength_t
    expect(math.isnan(strength) or 0 < strength <= MAX_FIELD_STRENGTH_T, "a case of an impossible field strength")
    expect(math.isnan(row.ef) or 0 <= row.ef <= 1, "a case of an impossible ejection fraction")
    try:
        info = CaseInfo(row.pseudonym, row.vendor, strength, row.ef, row.group, row.sex, row.pathology)
    except ValueError:
        raise Untrustworthy("a case whose sex or pathology is no code") from None
    expect(matches(info, wanted), "a case that was not requested")
    expect(0 < header.size <= MAX_CASE_BYTES, f"a case of more than {MAX_CASE_BYTES} bytes, or of none")
    expect(SHA256.fullmatch(header.sha256) is not None, "a SHA-256 that is none")
    return info


def check_file(header: CaseHeader, info: CaseInfo, content: bytes) -> None:
    """Whether these bytes are the case that was announced, and a case at all.

    Raises:
        Untrustworthy: They are not.
    """
    expect(
        len(content) == header.size and hashlib.sha256(content).hexdigest() == header.sha256,
        "a case whose bytes are not those of its SHA-256",
    )
    try:
        arrays = _arrays(content)
        Case(info, arrays["frames"], arrays["masks"], arrays["spacing_mm"])
    except (ValueError, KeyError, OSError, EOFError, BadZipFile, ZlibError, NotImplementedError, RuntimeError) as error:
        raise Untrustworthy(f"a file that is no case ({type(error).__name__})") from None


def _arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a case's file, whose sizes are known before anything is unpacked."""
    with ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(archive.infolist()) != len(DTYPES) or members.keys() != {f"{name}.npy" for name in DTYPES}:
            raise ValueError("Expected the arrays of a case.")
        return {name: _array(archive, members[f"{name}.npy"], dtype) for name, dtype in DTYPES.items()}


def _array(archive: ZipFile, member: ZipInfo, dtype: np.dtype[Any]) -> NDArray[Any]:
    """One array: no pickle, no other type, exactly as many bytes as its shape says."""
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or member.file_size > MAX_ARRAY_BYTES:
        raise ValueError("Expected an array of a case's size.")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version != (1, 0):
            raise ValueError("Expected version 1.0 of npy.")
        shape, is_fortran, found = npy.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
        # `ZipFile` gives no more than file_size, whatever is packed there, and compares the checksum at the end.
        data = file.read(MAX_ARRAY_BYTES)
    if found != dtype or is_fortran or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("Expected an array of a case's type, and as many bytes as its shape says.")
    return np.frombuffer(data, dtype).reshape(shape)
