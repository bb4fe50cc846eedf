"""The benchmark counts the memory of a whole process tree."""

import os
import subprocess
import sys

from simulations.benchmarks.stages import memory_kb


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
