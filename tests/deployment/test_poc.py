"""A study between institutions on one machine, in one command: the commands it gives, and what it leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedcmr.server.deployment import poc as poc_module
from fedcmr.server.deployment.poc import Poc, run_poc
from fedcmr.shared.errors import UserError
from tests.deployment.conftest import SETTINGS, server

SITE_STEPS = [
    ("client", "init"),
    ("client", "prepare"),
    ("client", "prepare"),
    ("server", "register"),
    ("client", "check"),
]


class Played:
    """Commands that are noted and do nothing, but for those that make files."""

    def __init__(self, fails_at=None):
        self.given, self.fails_at, self.ended = [], fails_at, []

    def run(self, command, cwd, **_):
        words = command[3:]
        self.given.append((command[2].split(".")[1], *words))
        if words[0] == "init" and command[2] == "fedcmr.server.cli":
            (cwd / "coordinator" / "logs").mkdir(parents=True)
            (cwd / "coordinator" / "coordinator.yaml").write_text("name: poc\n")
            (cwd / "coordinator" / "ca.key").write_text("secret")
            (cwd / "coordinator" / "logs" / "superlink.log").write_text("log")
        if words[0] == "run" and "--rehearsal" not in words:
            (cwd / "coordinator" / "runs" / "smoke").mkdir(parents=True)
            (cwd / "coordinator" / "runs" / "smoke" / "report.html").write_text("report")
        return subprocess.CompletedProcess(command, 7 if words[0] == self.fails_at else 0)

    def join(self, command, cwd, **_):
        self.given.append(("client", *command[3:]))
        played = self

        class Process:
            def poll(self):
                return 2 if played.fails_at == "join" else None

            def send_signal(self, sign):
                played.ended.append(command[-1])

            def wait(self, timeout=None):
                return 0

        return Process()


@pytest.fixture
def play(monkeypatch):
    def start(fails_at=None):
        played = Played(fails_at)
        monkeypatch.setattr(poc_module.subprocess, "run", played.run)
        monkeypatch.setattr(poc_module.subprocess, "Popen", played.join)
        states = {"sites": {"1-siemens": "offline" if fails_at == "join" else "online"}}
        monkeypatch.setattr(poc_module, "status", lambda *_: states)
        return played

    return start


def test_every_step_is_a_command_that_it_or_a_site_would_give(tmp_path, play, capfd):
    played = play()
    folder = tmp_path / "poc"
    assert server("poc", folder, "--sites", 2, "seed=3") == 0
    assert [words[:2] for words in played.given] == [
        ("simulations", "--until"),
        ("server", "init"),
        ("server", "start"),
        *SITE_STEPS,
        ("client", "join"),
        *SITE_STEPS,
        ("client", "join"),
        ("server", "run"),
        ("server", "run"),
        ("server", "status"),
        *[("client", "status")] * 2,
        ("server", "stop"),
    ]
    assert played.ended == ["sites/1-siemens", "sites/2-philips"]
    rehearsal, run = [words for words in played.given if words[1] == "run"]
    assert "--rehearsal" in rehearsal and "--rehearsal" not in run and run[-1] == "seed=3"
    assert {path.name for path in folder.iterdir()} == {"commands.txt", "logs", "report.html"}, "no key, no patient"
    assert (folder / "logs" / "coordinator-superlink.log").read_text() == "log"
    commands = (folder / "commands.txt").read_text()
    assert len(commands.splitlines()) == len(played.given)
    shown = capfd.readouterr().err
    assert all(f"$ {command}" in shown for command in commands.splitlines())
    assert re.search(r"^fedcmr-client init sites/1-siemens .*--authority coordinator/ca.crt", commands, re.MULTILINE)


@pytest.mark.parametrize("step", ["init", "register", "join", "run"])
def test_a_step_that_fails_ends_everything_and_leaves_the_logs(step, tmp_path, play, capsys):
    played = play(step)
    assert server("poc", tmp_path / "poc", "--sites", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and (("ended with code 7" in error) != (step == "join"))
    assert played.given[-1] == ("server", "stop", "coordinator")
    assert {path.name for path in (tmp_path / "poc").iterdir()} == {"commands.txt", "logs"}


def test_files_are_kept_on_request_and_the_study_is_left_out_of_a_rehearsal(tmp_path, play):
    played = play()
    assert server("poc", tmp_path / "poc", "--sites", 1, "--keep", "--rehearsal") == 0
    assert (tmp_path / "poc" / "coordinator" / "ca.key").is_file()
    assert [words for words in played.given if words[1] == "run" and "--rehearsal" not in words] == []


def test_an_interruption_ends_everything_too(tmp_path, play, monkeypatch):
    played = play()
    poc = Poc(tmp_path / "poc", 1, "smoke", [])
    monkeypatch.setattr(poc, "wait_online", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_poc(poc)
    assert played.given[-1] == ("server", "stop", "coordinator") and played.ended == ["sites/1-siemens"]


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for folder, number, settings, told in (
        ("full", 3, [], "not empty"),
        ("new", 21, [], "--sites"),
        ("new", 3, ["num_rounds=2"], "federation.num_rounds"),
    ):
        with pytest.raises(UserError, match=told):
            Poc(tmp_path / folder, number, "smoke", settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.engine
def test_a_whole_study_over_tls_in_one_command(tmp_path):
    folder = tmp_path / "poc"
    settings = [setting for setting in SETTINGS if not setting.startswith("federation.adapter")]
    command = [sys.executable, "-m", "fedcmr.server.cli", "poc", str(folder), "--sites", "2", *settings]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    shown, _ = process.communicate(timeout=850)
    assert process.returncode == 0, shown[-5000:]
    assert "the study can start" in shown and "2 of 2 sites" in shown
    report = json.loads((folder / "report.json").read_text())
    assert set(report["privacy"]["sites"]) == {"1-siemens", "2-philips"} and report["privacy"]["epsilon"] <= 8
    for site in ("1-siemens", "2-philips"):
        told = (folder / "logs" / f"join-{site}.log").read_text()
        assert "online: " in told and "answered round 1" in told and "Uvicorn" not in told
    assert not list(folder.rglob("*.key")) and not list(folder.rglob("*.npz")) and not list(folder.rglob("*.dcm"))
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if runs_in(pid, folder)], "no process is left"


def runs_in(process: Path, folder: Path) -> bool:
    try:
        return str(folder) in (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
