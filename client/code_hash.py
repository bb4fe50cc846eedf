"""The fingerprint of the code that touches patients: packages `client` and `shared` as they run here.

A ClientApp is not told the SHA-256 of the Flower bundle it came in: Flower 1.41 keeps it to the SuperNode, and only its
first eight digits are in the name of the folder that the bundle is unpacked to. So the site's policy pins the source
files themselves, which are the same in a checkout, a wheel and a bundle.

Guarantees: none against a bundle that was made to deceive, for it can leave this check out. It keeps a site from
answering with a version that nobody there has reviewed. Who may start code at a site is decided before that code runs,
by whoever runs the SuperNode.
"""

import functools
import hashlib
from pathlib import Path

PACKAGES = ("client", "shared")


@functools.cache
def code_sha256() -> str:
    """SHA-256 over the names and contents of all Python files of `PACKAGES`, as first read by this process."""
    return sha256_of(Path(__file__).resolve().parents[1])


def sha256_of(root: Path) -> str:
    """The same for the packages below a folder: a checkout, or a bundle that was unpacked."""
    paths = {path.relative_to(root).as_posix(): path for name in PACKAGES for path in (root / name).rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(paths):
        digest.update(f"{name} {hashlib.sha256(paths[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
