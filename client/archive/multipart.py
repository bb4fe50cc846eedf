"""The body of a WADO-RS answer, `multipart/related` (RFC 2387), part by part onto the disk: never one in memory."""

import re
from collections.abc import Iterable
from pathlib import Path

from fedcmr.client.archive.archive import Broken
from fedcmr.shared.permissions import private_opener

MAX_HEADER_BYTES = 65_536


def boundary_of(content_type: str) -> bytes | None:
    """What separates the parts; None where a Content-Type is not multipart."""
    found = re.search(r'boundary="?([^";,]+)"?', content_type, re.IGNORECASE)
    return found[1].strip().encode("latin-1") if found and content_type.lower().startswith("multipart/") else None


def save_parts(chunks: Iterable[bytes], boundary: bytes, folder: Path) -> int:
    """Write every part of a body to a file of its own, `000000.dcm` and on.

    Args:
        chunks: The body, cut anywhere.
        boundary: Of its parts.
        folder: Where to write.

    Returns:
        Number of files.

    Raises:
        Broken: The body ends before its end, or is no such body.
    """
    delimiter = b"\r\n--" + boundary
    buffer = bytearray(b"\r\n")  # the first delimiter has no line before it
    number, part = 0, None
    try:
        for chunk in chunks:
            buffer += chunk
            while True:
                at = buffer.find(delimiter)
                if part is not None:
                    written = at if at >= 0 else len(buffer) - len(delimiter) + 1
                    if written > 0:
                        part.write(buffer[:written])
                        del buffer[:written]
                    if at < 0:
                        break
                    part.close()
                    part = None
                    continue
                if at < 0 or len(buffer) < at + len(delimiter) + 2:
                    if at < 0 and len(buffer) > MAX_HEADER_BYTES:
                        raise Broken("it sends an answer whose parts cannot be told apart")
                    break
                if buffer[at + len(delimiter) :].startswith(b"--"):
                    return number
                end = buffer.find(b"\r\n\r\n", at + len(delimiter))
                if end < 0:
                    if len(buffer) > at + MAX_HEADER_BYTES:
                        raise Broken("it sends an answer whose parts cannot be told apart")
                    break
                del buffer[: end + 4]
                part = open(folder / f"{number:06d}.dcm", "wb", opener=private_opener)  # noqa: SIM115
                number += 1
    finally:
        if part is not None:
            part.close()
    raise Broken("its answer ends in the middle")
