"""Checkpoints: arrays with JSON metadata in one safetensors file, written atomically, newest readable first."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as from_bytes  # noqa: F401
from safetensors.numpy import save as to_bytes

from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder, private_opener

Arrays = dict[str, NDArray[np.float32]]

MAX_HEADER_BYTES = 4 * 2**20
"""Some 40,000 arrays; ours have a few hundred."""
ROUND_NAME = re.compile(r"round_(\d{4,})\.safetensors")


def save(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write `path` so that it is there whole or not at all, also after a power cut.

    Args:
        path: The file, for this account alone; its folder is created.
        arrays: Any names and shapes.
        metadata: What JSON can hold; stands readable in the file's header.
    """
    private_folder(path.parent)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, to_bytes(contiguous, metadata={"json": json.dumps(metadata)}))


def load(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read what `save` wrote.

    Raises:
        UserError: The file is missing, truncated or not one of ours.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of what `save` wrote, and no array.

    Raises:
        UserError: The file is missing, truncated or not one of ours.
    """
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((file.metadata() or {})["json"])
    return metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A checkpoint to read from; whatever is wrong with it, now or while it is read, is one `UserError`."""
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header alone would fill the memory, before it is read.

    Raises:
        ValueError: Its header is longer than that of any file of ours.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"Expected a header of at most {MAX_HEADER_BYTES} bytes.")


def round_path(folder: Path, server_round: int) -> Path:
    """The checkpoint of a finished round; round 0 is the state before the first one."""
    return folder / f"round_{server_round:04d}.safetensors"


def load_newest(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """The newest readable checkpoint of a run: one that was damaged falls back to the one before.

    Returns:
        What `load` returns, or None where no round was ever saved.

    Raises:
        UserError: There are checkpoints and none can be read. Starting afresh would spend the sites' budgets again.
    """
    paths = [path for path in folder.glob("round_*.safetensors") if ROUND_NAME.fullmatch(path.name)]
    for path in sorted(paths, key=lambda path: int(path.stem.removeprefix("round_")), reverse=True):
        try:
            return load(path)
        except UserError:
            continue
    if paths:
        raise UserError(f"none of {len(paths)} checkpoints in {folder} can be read: restore one, or use a new folder")
    return None


def write_atomically(path: Path, content: bytes, private: bool = True) -> None:
    """Write next to `path`, flush to the disk, then rename over it (POSIX rename is atomic).

    Args:
        path: The file; its folder exists.
        content: All of it.
        private: Whether only this account may read it, whatever the umask; False for what is meant for others.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb", opener=private_opener if private else None) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
