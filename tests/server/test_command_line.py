"""Settings on a command line: both forms, anywhere, for every command that takes any."""

import importlib
import sys
from pathlib import Path

import pytest

from fedcmr.server import cli as server_cli
from fedcmr.server.command_line import SettingsParser
from fedcmr.simulations import cli as simulate_cli
from fedcmr.simulations.audit import cli as audit_cli

GIVEN = ["seed=1", "privacy.target_epsilon=3", "evaluation.baselines=[]"]


def parser() -> SettingsParser:
    made = SettingsParser()
    made.add_argument("folder", type=Path)
    made.add_argument("--data", nargs="+")
    made.add_argument("--out")
    made.add_settings()
    return made


@pytest.mark.parametrize(
    "words",
    [
        ["f", "--data", "a", "b", *GIVEN, "--out", "x"],
        [*GIVEN, "f", "--data", "a", "b", "--out", "x"],
        ["f", GIVEN[0], "--out", "x", GIVEN[1], "--data", "a", "b", GIVEN[2]],
        ["--set", *GIVEN, "--out", "x", "f", "--data", "a", "b"],
        ["f", "--out", "x", "--set", GIVEN[0], "--set", GIVEN[1], "--data", "a", "b", "--set", GIVEN[2]],
        ["f", "--out", "x", GIVEN[0], "--set", GIVEN[1], "--data", "a", "b", GIVEN[2]],
    ],
)
def test_settings_stand_anywhere_with_or_without_set(words):
    options = parser().parse_args(words)
    assert options.settings == GIVEN
    assert (options.folder, options.data, options.out) == (Path("f"), ["a", "b"], "x")


def test_a_word_that_is_no_setting_is_not_lost():
    assert parser().parse_args(["f", "seed"]).settings == ["seed"], "it is refused where settings are read"
    assert parser().parse_args(["f", "--data", "a/b=c"]).data == ["a/b=c"], "a path stays one"
    with pytest.raises(SystemExit):
        parser().parse_args(["f", "--sed=1"])


def seen_by(monkeypatch, module, name, words):
    """The options with which a command's body is called, without its work."""
    seen = []
    monkeypatch.setattr(module, name, seen.append)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    assert module.main() == 0
    return seen[0]


BENCHMARKS = {
    "adapters": ("_benchmark", ["--cases", "a", "--held-out", "b"]),
    "recipe": ("_benchmark", ["--synthetic", "a", "--test", "b", "--out", "c"]),
    "training": ("_measure", ["--test", "a"]),
    "stages": ("_measure", []),
    "utility": ("_measure", []),
}


@pytest.mark.parametrize("form", [[], ["--set"]], ids=["alone", "set"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_take_both_forms(name, form, monkeypatch):
    body, words = BENCHMARKS[name]
    module = importlib.import_module(f"fedcmr.simulations.benchmarks.{name}")
    assert seen_by(monkeypatch, module, body, [*words, *form, *GIVEN]).settings == GIVEN


@pytest.mark.parametrize("form", [[], ["--set"]], ids=["alone", "set"])
def test_simulate_and_audit_take_both_forms(form, monkeypatch):
    assert seen_by(monkeypatch, simulate_cli, "_run", ["--out", "x", *form, *GIVEN]).settings == GIVEN
    assert seen_by(monkeypatch, audit_cli, "_run", ["canaries", *form, *GIVEN]).settings == GIVEN


@pytest.mark.parametrize("form", [[], ["--set"]], ids=["alone", "set"])
@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "--out", "p"],
        ["segmenter", "--out", "p"],
        ["train", "--out", "p", "--data", "d"],
        ["evaluate", "--model", "m", "--test", "d"],
        ["run", "study", "--test", "d"],
    ],
    ids=lambda words: words[0],
)
def test_the_servers_commands_take_both_forms(command, form):
    assert server_cli._parser().parse_args([*command, *form, *GIVEN]).settings == GIVEN
