"""The fingerprint of the code that touches patients: packages `client` and `shared`, and the import name's own file.

A ClientApp does not learn the SHA-256 of the Flower bundle it came in: Flower 1.41 keeps it to the SuperNode, and only
its first eight digits are in the name of the folder that the bundle is unpacked to. So the site's policy pins the
source files themselves, which are the same in a checkout, a wheel and a bundle.

Guarantees: none against a bundle that was made to deceive, for it can leave this check out. It keeps a site from
answering with a version that nobody there has reviewed. Who may start code at a site is decided before that code runs,
by whoever runs the SuperNode.
"""

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from fedcmr.shared.errors import UserError

PACKAGES = ("client", "shared")
IMPORT_NAME = "fedcmr/__init__.py"
"""Decides where the packages are imported from, and so counts as they do. In a wheel it lies above them."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
"""Names of files that mean one thing to every system: relative, no dot first in a part (and so no `..`), no control
character, no space and no letter that looks like another one."""


@functools.cache
def code_sha256() -> str:
    """SHA-256 over names and contents of `IMPORT_NAME` and all Python files of `PACKAGES`, as first read here."""
    return sha256_of(Path(__file__).resolve().parents[1])


def sha256_of(root: Path) -> str:
    """The same for the packages below a folder: a checkout, or a bundle that was unpacked.

    Raises:
        UserError: A file has a name that is not safe.
    """
    paths = [path for name in PACKAGES for path in (root / name).rglob("*.py")]
    start = root / IMPORT_NAME if (root / IMPORT_NAME).is_file() else root / "__init__.py"
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    return sha256_of_files(files | {IMPORT_NAME: start.read_bytes()})


def sha256_of_files(files: Mapping[str, bytes]) -> str:
    """The same for files in memory, by name; others than `IMPORT_NAME` and Python files of `PACKAGES` do not count.

    Guarantees:
        Injective up to collisions of SHA-256: the number of files, and the length of every name and content, go into
        the hash before the bytes themselves, so that no name or content can be read as the end of another one.

    Raises:
        UserError: A file has a name that is not safe.
    """
    for name in files:
        if not SAFE_NAME.fullmatch(name):
            raise UserError(f"{name!r}: expected a file name of letters, digits and _-./ alone; rename or remove it")
    pinned = sorted(name for name in files if _counts(name))
    digest = hashlib.sha256(b"fedcmr code 2" + _length(len(pinned)))
    for name in pinned:
        for part in (name.encode(), files[name]):
            digest.update(_length(len(part)) + part)
    return digest.hexdigest()


def _counts(name: str) -> bool:
    """Whether a file is part of what the site approves."""
    return name == IMPORT_NAME or (name.split("/")[0] in PACKAGES and name.endswith(".py"))


def _length(number: int) -> bytes:
    """Eight bytes, whatever the number."""
    return number.to_bytes(8, "big")
