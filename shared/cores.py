"""How many cores this process may use: fewer than the machine has, under Slurm, taskset or a container."""

import math
import os
from contextlib import suppress
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Of control groups, version 2: microseconds of all cores in a period, or "max", and the period."""


def num_cores() -> int:
    """Cores that the scheduler lets this process use, or that its container's share of time amounts to; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = CPU_MAX.read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
