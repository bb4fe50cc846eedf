"""Cores that a process may use."""

import os

import pytest

from fedcmr.shared import cores
from fedcmr.shared.cores import num_cores


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [
        ({0}, None, 1),
        ({0, 3, 5}, None, 3),
        ({0, 1, 2, 3}, "max 100000", 4),
        ({0, 1, 2, 3}, "150000 100000", 2),
        ({0, 1}, "50000 100000", 1),
        ({0, 1}, "no numbers", 2),
    ],
)
def test_cores_are_those_of_the_process_and_not_of_the_machine(tmp_path, monkeypatch, allowed, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert num_cores() == expected


def test_where_the_system_tells_no_cores_of_a_process_the_machines_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "none")
    assert num_cores() == 1
