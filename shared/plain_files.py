"""Small files that somebody else has put somewhere: read whole, or not at all."""

import errno
import os
import stat
from pathlib import Path

MIB = 2**20


def read_plain(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    A device, a pipe or a socket is never read, and a pipe without a writer is not waited for.

    Raises:
        OSError: It is no regular file, is larger, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes")
    return content
