"""The plain files below a folder of scans."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def plain_files(source: Path, left_out: Counter[str]) -> Iterator[str]:
    """Paths of plain files below a folder, folder by folder and in the order of their names.

    Links, also to folders, are not followed: what they lead to lies elsewhere or is found anyway. The folder itself
    may be a link, for the user has chosen it.

    Args:
        source: The folder.
        left_out: Counts what is passed over: "no-regular-file" and "unreadable".
    """
    folders = [str(source)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            left_out["unreadable"] += 1
            continue
        below = []
        for entry in found:
            try:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield entry.path
                else:
                    left_out["no-regular-file"] += 1
            except OSError:
                left_out["unreadable"] += 1
        folders += reversed(below)
