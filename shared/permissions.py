"""Who may read what is about patients: the account that made it, and nobody else, whatever the umask says.

A folder is 0700 and a file 0600, set explicitly. What is meant for others, such as a released synthetic data set, is
made as the umask says.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600
OTHERS = 0o077


def private_folder(path: Path) -> Path:
    """Make a folder, and those above it that are missing, for this account alone; one that is there stays as it is."""
    if not path.is_dir():
        private_folder(path.parent)
        path.mkdir(exist_ok=True)  # exist_ok: another process may have made it
        path.chmod(FOLDER_MODE)
    return path


def private_opener(path: str, flags: int) -> int:
    """`opener` of `open` for a file of this account alone, also where an earlier version has let others read it."""
    descriptor = os.open(path, flags, FILE_MODE)
    if os.fstat(descriptor).st_mode & OTHERS:
        os.fchmod(descriptor, FILE_MODE)
    return descriptor


def make_private(root: Path) -> None:
    """Take a folder that was copied, and all that is in it, from everybody else."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)


def open_to_others(roots: Iterable[Path]) -> list[Path]:
    """Those of some files and folders that the group or the world may use: the roots, and what lies in them.

    Below a folder that only this account may enter everything is out of reach, but a copy of it would not be: so files
    are looked at there too.
    """
    found = []
    for root in roots:
        if not root.exists():
            continue
        for path in [root, *(root.rglob("*") if root.is_dir() else [])]:
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & OTHERS:
                found.append(path)
    return found
