"""The benchmark counts the memory of a whole process tree."""

import os
import subprocess
import sys

import pytest

from fedcmr.simulations.benchmarks import stages
from fedcmr.simulations.benchmarks.stages import memory_kb, watched


def test_memory_includes_child_processes():
    alone = memory_kb(os.getpid())
    script = "import sys; data = bytearray(120 << 20); print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b"ready\n"
    grown = memory_kb(os.getpid()) - alone
    child.communicate(b"")
    assert 110 << 10 < grown < 200 << 10


def test_a_process_that_is_gone_counts_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_kb(child.pid) == 0


def test_what_is_watched_does_not_outlive_an_interruption(monkeypatch):
    found = []

    def interrupted(pid):
        found.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "memory_kb", interrupted)
    monkeypatch.setattr(stages, "GRACE_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        watched([sys.executable, "-c", "import time; time.sleep(600)"], "a command", 0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)
