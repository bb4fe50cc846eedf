"""An executor that fails is started again, and ends with what keeps it running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcmr.server.deployment import executor
from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.deployment.services import EXECUTOR, running_pid
from tests.deployment.conftest import descendants, server, wait_for

KEPT = "flower-superexec"


def program(path: Path, last: str) -> list[str]:
    """A program that notes its number, fails twice with code 3, and then does the last thing."""
    path.write_text(
        "import pathlib, sys, time\n"
        "notes = pathlib.Path(sys.argv[1])\n"
        "with notes.open('a') as file: print(' '.join(sys.argv[2:]), file=file, flush=True)\n"
        f"{last} if len(notes.read_text().splitlines()) > 2 else sys.exit(3)\n"
    )
    return [sys.executable, str(path), str(path.with_suffix(".notes"))]


def test_a_failing_program_is_started_again_until_it_ends_well(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(executor, "PAUSE_S", 0.01)
    assert executor.keep_running(program(tmp_path / "p.py", "sys.exit(0)")) == 0
    assert len((tmp_path / "p.notes").read_text().splitlines()) == 3
    assert capfd.readouterr().err.count("ended with code 3: it is started again") == 2


def test_a_program_that_always_fails_at_once_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "PAUSE_S", 0.01)
    assert executor.keep_running(program(tmp_path / "p.py", "sys.exit(4)")) == 4
    assert len((tmp_path / "p.notes").read_text().splitlines()) == executor.MAX_QUICK


def test_failures_that_are_not_quick_are_never_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "PAUSE_S", 0.01)
    monkeypatch.setattr(executor, "QUICK_S", 0.0)
    monkeypatch.setattr(executor, "MAX_QUICK", 1)
    assert executor.keep_running(program(tmp_path / "p.py", "sys.exit(0)")) == 0


def test_sigterm_ends_both(tmp_path):
    command = [sys.executable, "-c", f"import signal; from {executor.__name__} import *; PAUSE_S = 0; main()"]
    kept = program(tmp_path / "p.py", "time.sleep(600)")
    process = subprocess.Popen([*command, *kept], stderr=subprocess.DEVNULL)
    notes = tmp_path / "p.notes"
    wait_for(lambda: notes.exists() and len(notes.read_text().splitlines()) == 3, "the third start", every_s=0.05)
    assert notes.read_text().splitlines()[-1] == f"--parent-pid {process.pid}", "for an end without a SIGTERM"
    (child,) = [pid for pid in descendants(process.pid, "p.py") if pid != process.pid]
    process.terminate()
    assert process.wait(timeout=30) == 0
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.engine
def test_flowers_executor_is_there_again_after_it_has_died(deployed):
    assert server("start", deployed.folder) == 0
    kept_by = running_pid(load_coordinator(deployed.folder), EXECUTOR)
    wait_for(lambda: [pid for pid in descendants(kept_by, KEPT) if pid != kept_by], "the executor")
    (first,) = [pid for pid in descendants(kept_by, KEPT) if pid != kept_by]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: {*descendants(kept_by, KEPT)} - {kept_by, first}, "another one")
    assert running_pid(load_coordinator(deployed.folder), EXECUTOR) == kept_by
    time.sleep(1)  # it has not ended at once
    assert {*descendants(kept_by, KEPT)} - {kept_by, first}
    server("stop", deployed.folder)
    wait_for(lambda: not Path(f"/proc/{kept_by}").exists() or not descendants(kept_by, KEPT), "the end of both")
    assert server("start", deployed.folder) == 0, "as other tests expect it"
