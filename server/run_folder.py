"""A run's folder: its settings, its log, and which stages are done.

`metrics.jsonl` is the one record: what was measured, and `{"stage": ..., "done": true}` for every finished stage, so
that the same command resumes after an interruption.
"""

import errno
import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fedcmr.server.settings import Config, dump, load
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PRIVATE_NAME
from fedcmr.shared.permissions import make_private, private_opener
from fedcmr.shared.progress import console

CONFIG_NAME, LOG_NAME, METRICS_NAME = "config.yaml", "log.txt", "metrics.jsonl"
REGRESSOR_NAME = "regressor.safetensors"
"""The main model."""


class RunFolder:
    """A folder opened by `open_run` or `load_run`.

    Attributes:
        path: The folder.
        config: Its settings.
    """

    def __init__(self, path: Path, config: Config):
        self.path, self.config = path, config
        self._lock: TextIO | None = None

    def site_names(self) -> list[str]:
        """The sites of this run, sorted."""
        return sorted(path.parent.name for path in (self.path / "sites").glob("*/site.yaml"))

    def prior_path(self) -> Path | None:
        """The prior the settings name; None for the one that ships with the project."""
        return None if self.config.prior is None else Path(self.config.prior)

    def log(self, text: str) -> None:
        """Print a line and append it to `log.txt`."""
        console.print(text, highlight=False, markup=False)
        with open(self.path / LOG_NAME, "a", encoding="utf-8", opener=private_opener) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metric(self, values: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.path / METRICS_NAME, "a", encoding="utf-8", opener=private_opener) as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`; one cut off by a crash is left out."""
        path = self.path / METRICS_NAME
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        values = []
        for line in lines:
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return values

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of the federation's rounds, in order."""
        return [line for line in self.metrics() if line.get("stage") == "federation" and "round" in line]

    def is_done(self, stage: str) -> bool:
        """Whether a stage was finished, now or by an earlier call."""
        return stage in self.stage_seconds()

    def mark_done(self, stage: str, seconds: float) -> None:
        """Record that a stage is finished."""
        self.metric({"stage": stage, "done": True, "elapsed_s": round(seconds, 2)})

    def stage_seconds(self) -> dict[str, float]:
        """Seconds of every finished stage, in order."""
        return {line["stage"]: line["elapsed_s"] for line in self.metrics() if line.get("done")}

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Run a stage once: yields whether there is work to do, and marks it done when its body ends well."""
        if self.is_done(name):
            yield False
            return
        started = time.monotonic()
        yield True
        seconds = time.monotonic() - started
        self.mark_done(name, seconds)
        self.log(f"{name}: done in {seconds:.0f} s")

    def lock(self) -> None:
        """Keep a second process out of this folder for as long as this object lives; this process may call it twice.

        Raises:
            UserError: Another process is using the folder.
        """
        place = self.path.resolve()
        if place in _locked:
            return
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(f"{self.path} is in use by another process: wait for it or give another --out") from None
        _locked[place] = self

    def unlock(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        _locked.pop(self.path.resolve(), None)


_locked: weakref.WeakValueDictionary[Path, RunFolder] = weakref.WeakValueDictionary()
"""The folders that this process has locked."""


def open_run(path: Path, config: Config) -> RunFolder:
    """Make a run folder, or open the one that the same settings made.

    Raises:
        UserError: The folder holds something else, belongs to other settings, or cannot be written.
    """
    wanted = dump(config)
    file = path / CONFIG_NAME
    try:
        if file.is_file():
            _check_same(path, config)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a run folder: give a new or empty folder as --out")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(file, wanted.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another folder as --out") from None
    run = RunFolder(path, config)
    run.lock()
    return run


@contextmanager
def begun_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Open a run folder as `open_run` does; where the body fails before anything is finished, nothing is left of it.

    Otherwise a mistake that shows only here, such as a wrong `data_root`, would keep the folder's name from the
    corrected command. What took time is kept: a finished stage, or a single case or scan.
    """
    is_there, is_new = path.is_dir(), not (path / CONFIG_NAME).is_file()
    run = open_run(path, config)
    try:
        yield run
    except UserError:
        if is_new and not run.stage_seconds() and not _holds_work(path):
            for part in path.iterdir():
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink()
            _locked.pop(path.resolve(), None)
            if not is_there:
                path.rmdir()
        raise


def _holds_work(path: Path) -> bool:
    """Whether a case, a scan or a checkpoint was written."""
    return any(file.suffix in (".npz", ".dcm", ".safetensors") for file in path.rglob("*"))


def load_run(path: Path) -> RunFolder:
    """Open an existing run folder with its own settings.

    Raises:
        UserError: It is not a run folder.
    """
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{path} is not a run folder (no {CONFIG_NAME}): make one with 'fedcmr-simulate --out {path}'")
    return RunFolder(path, load(path / CONFIG_NAME))


def copy_cases(folder: Path, copy: Path) -> None:
    """Copy a folder of prepared cases for this account alone, without what its own site keeps of them."""
    shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PRIVATE_NAME))
    make_private(copy)


def _check_same(path: Path, config: Config) -> None:
    """Refuse settings that differ from the run's own; the message gives the first line that differs."""
    try:
        before = dump(load(path / CONFIG_NAME)).splitlines()
    except UserError:
        raise UserError(f"{path}/{CONFIG_NAME} cannot be read: give another folder as --out") from None
    for old, new in zip(before, dump(config).splitlines(), strict=False):
        if old != new:
            raise UserError(
                f"{path} belongs to other settings ({old.strip()!r} there, {new.strip()!r} now): give another --out"
            )
    if len(before) != len(dump(config).splitlines()):
        raise UserError(f"{path} belongs to other settings: give another folder as --out")
