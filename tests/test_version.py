"""Every command tells its version."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "simulations" / "benchmarks").glob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_a_command_tells_its_version(command, monkeypatch, capsys):
    module, _, function = PROJECT["scripts"][command].partition(":")
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)()
    assert end.value.code == 0
    assert capsys.readouterr().out.split() == [command, PROJECT["version"]]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_tells_its_version(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"fedcmr.simulations.benchmarks.{name}").main()
    assert end.value.code == 0
    assert capsys.readouterr().out.split()[-1] == PROJECT["version"]
