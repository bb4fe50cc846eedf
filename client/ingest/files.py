"""The files below a folder of scans, by the same rules for every layout; what is passed over is counted."""

import filecmp
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from fedcmr.client.ingest.places import Place, Tally, common_folder

SYSTEM_FOLDERS = frozenset(
    {
        "__macosx",
        ".spotlight-v100",
        ".fseventsd",
        ".trashes",
        ".trash",
        "$recycle.bin",
        "system volume information",
        "@eadir",
        "lost+found",
        ".snapshot",
        ".git",
        ".datalad",
    }
)
"""Folders that a system, a file server or git keeps beside the data, in lower case."""
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "desktop.ini", ".directory", ".bidsignore", ".gitattributes"})
SYSTEM_PREFIXES = ("._", "~$", ".nfs")
"""A Mac's twin of a file (AppleDouble), Excel's mark on an open table, a file that is open elsewhere."""
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".7z", ".rar", ".dcm.gz")
NIFTI_SUFFIXES = (".nii.gz", ".nii")


def plain_files(source: Path, left_out: Tally) -> Iterator[str]:
    """Paths of the files below a folder, folder by folder and in the order of their names.

    A link to a file counts as that file, under the link's own name: git-annex and many studies' scripts make folders of
    links. Linked folders are read after all others and every folder once, so that links in a circle end.

    Args:
        source: The folder; may be a link itself.
        left_out: Counts what is passed over: "no-regular-file", "unreadable", "system-file" and "archive".
    """
    folders, linked = [str(source)], list[str]()
    seen: set[tuple[int, int]] = set()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                left_out.add("no-regular-file", folder)
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            left_out.add("unreadable", folder)
            continue
        below: list[str] = []
        for entry in found:
            try:
                if is_system(entry.name):
                    left_out.add("system-file", entry.path)
                elif entry.is_dir():
                    (linked if entry.is_symlink() else below).append(entry.path)
                elif not entry.is_file():
                    left_out.add("no-regular-file", entry.path)
                elif entry.name.lower().endswith(ARCHIVES):
                    left_out.add("archive", entry.path)
                else:
                    yield entry.path
            except OSError:
                left_out.add("unreadable", entry.path)
        folders += reversed(below)


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is the system's own, and no part of the data."""
    lower = name.lower()
    return lower in SYSTEM_FOLDERS or lower in SYSTEM_FILES or lower.startswith(SYSTEM_PREFIXES)


def nifti_stem(name: str) -> str | None:
    """A NIfTI file's name without its suffix, which may be in capitals; None for another file."""
    suffix = next((suffix for suffix in NIFTI_SUFFIXES if name.lower().endswith(suffix)), None)
    return None if suffix is None else name[: -len(suffix)]


def same_name(name: str) -> str:
    """The one form in which names are compared: a Mac writes letters and their accents apart (Unicode NFD)."""
    return unicodedata.normalize("NFC", name.strip())


def nifti_files(
    source: Path,
    named: Callable[[str], str | None],
    left_out: Tally,
    refused: Tally,
    known: Collection[str] = (),
) -> dict[str, Path]:
    """The NIfTI files that a layout reads, wherever below the folder they lie.

    Of one file as `.nii` and as `.nii.gz` in one folder the compressed one is taken, and the other counts as a
    duplicate; so do equal files in several folders.

    Args:
        source: The folder.
        named: What a layout calls a file, by its name without the suffix and in `same_name`'s form; None for one that
            it does not read, and an empty name for one that belongs to the layout and is not needed.
        left_out: Counts what is passed over; "other-file" what is no file of this layout.
        refused: Counts "same-name" where two folders hold different files of one name: which is meant is unknown.
        known: Suffixes of the layout's other files.
    """
    found: dict[str, list[Path]] = {}
    for path in map(Path, plain_files(source, left_out)):
        stem = nifti_stem(path.name)
        name = None if stem is None else named(same_name(stem))
        if name:
            found.setdefault(name, []).append(path)
        elif name is None and path.suffix.lower() not in known:
            left_out.add("other-file", path)
    chosen = {}
    for name, paths in found.items():
        by_folder: dict[Path, Path] = {}
        for path in paths:
            if path.parent not in by_folder or path.name.lower().endswith(".gz"):
                by_folder[path.parent] = path
        first, *others = by_folder.values()
        if all(_same_bytes(first, other) for other in others):
            chosen[name] = first
            for path in paths:
                if path != first:
                    left_out.add("duplicate", path)
        else:
            refused.add("same-name", Place(common_folder(paths), name))
    return chosen


def find_named(folder: Path, name: str) -> Path:
    """A file or folder by its name in any capitals; the name as it is where there is none.

    Of several the one that is spelt like `name` comes first.
    """
    exact = folder / name
    if exact.exists():
        return exact
    try:
        return min((path for path in folder.iterdir() if path.name.lower() == name.lower()), default=exact)
    except OSError:
        return exact


def lookup(name: str, names: Iterable[str]) -> str | None:
    """The one of several names that means the same: in `same_name`'s form, else the only one in other capitals."""
    by_form = {same_name(one): one for one in names}
    if (found := by_form.get(same_name(name))) is not None:
        return found
    others = [one for form, one in by_form.items() if form.casefold() == same_name(name).casefold()]
    return others[0] if len(others) == 1 else None


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are copies of each other."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False
