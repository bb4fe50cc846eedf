"""Which code a site lets in: Flower's bundle is checked before it is unpacked, let alone run.

Guarantees:
    No file of a bundle is unpacked or imported unless its packages `client` and `shared` and its `fedcmr/__init__.py`
    are, byte for byte, a version that `policy.allowed_code_sha256` lists, its ClientApp is the one that
    `fedcmr/__init__.py` names, and it holds nothing else that Python could import in place of a library: only .py files
    of our packages, settings and texts. An empty list lets nothing in.
    Not covered: the libraries installed at the site, and whoever may write to the site's own folders.
"""

import io
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from fedcmr.client.code_hash import IMPORT_NAME, SAFE_NAME, sha256_of_files

CODE_FOLDERS = ("client", "server", "shared")
TEXTS = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
CLIENTAPP = "fedcmr:client_app"
CONTENT_LIST = ".info/CONTENT"
"""Flower's own list of the files' hashes; it is not unpacked."""
MAX_BYTES = 50_000_000
"""Unpacked: fifty times what it takes."""


class BundleRefused(Exception):  # noqa: N818
    """The bundle is not what the site approved. The message is a code: it travels to the server."""


def check_bundle(content: bytes, allowed: Sequence[str]) -> None:
    """Refuse a bundle that is not an approved version.

    Args:
        content: Bytes of the bundle, a zip file.
        allowed: Fingerprints as `fedcmr-client code` prints them.

    Raises:
        BundleRefused: See the module's guarantees.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            folders = [entry.filename for entry in archive.infolist() if entry.is_dir()]
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES or len(set(names)) < len(names) or not all(map(_is_expected, names)):
                raise BundleRefused("code-not-allowed")
            if not all(any(name.startswith(folder) for name in names) for folder in folders):
                raise BundleRefused("code-not-allowed")
            settings = tomllib.loads(archive.read("pyproject.toml").decode())
            found = sha256_of_files({name: archive.read(name) for name in names if name != CONTENT_LIST})
    except BundleRefused:
        raise
    except Exception:  # whatever a hostile archive does to the reader
        raise BundleRefused("code-not-allowed") from None
    components = settings.get("tool", {}).get("flwr", {}).get("app", {}).get("components", {})
    if components.get("clientapp") != CLIENTAPP or found not in allowed:
        raise BundleRefused("code-not-allowed")


def is_unpacked(content: bytes, folder: Path) -> bool:
    """Whether a folder holds the files of a bundle, byte for byte, and no others but Python's own cache.

    Flower takes a folder of the bundle's name as the bundle: also one that an interruption left half full.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and name != CONTENT_LIST]
        expected = {name: archive.read(name) for name in names}
    found = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_symlink() or not (path.is_dir() or path.parent.name == "__pycache__")
    }
    return found.keys() == expected.keys() and all(
        not path.is_symlink() and path.read_bytes() == expected[name] for name, path in found.items()
    )


def _is_expected(name: str) -> bool:
    """Whether a file may be in a bundle: a source of our packages, a setting, a text, or Flower's list of hashes."""
    path = PurePosixPath(name)
    if name in (CONTENT_LIST, IMPORT_NAME):
        return True
    if not SAFE_NAME.fullmatch(name):
        return False
    if len(path.parts) == 1:
        return name in TEXTS
    folder = path.parts[0]
    return (folder in CODE_FOLDERS and path.suffix == ".py") or (
        folder == "configs" and path.suffix == ".yaml" and len(path.parts) == 2
    )
