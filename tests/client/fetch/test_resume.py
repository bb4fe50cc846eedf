"""What breaks resumes: cut connections, a server that dies, a client that ends, a full disk; never another folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest

from fedcmr.client.fetch import fetch as fetching
from fedcmr.client.fetch.folder import ReceivedCases
from fedcmr.server import cli as server_cli
from fedcmr.server.delivery.released_set import open_released_set
from fedcmr.server.delivery.serve import Service
from fedcmr.server.deployment.coordinator import COORDINATOR_FILE, Coordinator, write_coordinator
from fedcmr.shared.delivery.delivery_pb2 import DescribeRequest, Description
from tests.server.delivery.conftest import Wire, content, stub_of


@pytest.fixture
def expected(service, fetch, tmp_path):
    """The folder of an undisturbed fetch."""
    assert fetch(service.port, out="expected") == 0
    return content(tmp_path / "expected")


class Arriving:
    """Before each cut: wait until two more cases are in the folder, since a cut takes with it what was not yet read."""

    def __init__(self, folder):
        self.folder, self.wanted = folder, 0

    def __call__(self):
        self.wanted += 2
        deadline = time.monotonic() + 120
        while len(list(self.folder.glob("cases/*.npz"))) < self.wanted and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def wire(service, tmp_path):
    """A wire that is cut three times, in the middle of a case."""
    wire = Wire(service.port, cut_after=[500_000, 400_000, 700_000], on_cut=Arriving(tmp_path / "out"))
    yield wire
    wire.close()


def test_a_cut_connection_resumes_by_itself_to_an_identical_folder(wire, expected, fetch, place, tmp_path, capsys):
    assert fetch(wire.port) == 0
    assert wire.num_cut == 3 and "trying again" in capsys.readouterr().err
    assert content(tmp_path / "out") == expected
    calls = [line for line in place.audit() if line["method"].endswith("Stream")][1:]
    assert len(calls) == 4 and calls[-1]["cases"] <= 24 - 3 * 2, "whole cases are not sent again"


def test_without_patience_it_ends_and_the_same_command_resumes(wire, expected, fetch, tmp_path, capsys):
    codes = []
    while not codes or codes[-1]:
        codes.append(fetch(wire.port, "--patience", 0))
        assert len(codes) < 6
        if codes[-1]:
            assert not (tmp_path / "out" / "cases.csv").exists(), "half a set is not taken for a whole one"
    assert codes.count(2) == 3 and "the same command again resumes" in (shown := capsys.readouterr().err)
    assert "resuming after" in shown
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_is_found(
    finished, place, offer, expected, fetch, tmp_path, free_port, capsys
):
    command = [
        sys.executable,
        "-m",
        "fedcmr.server.cli",
        "deliver",
        str(finished.path),
        "--folder",
        str(place.folder),
        "--port",
        str(free_port),
        "--no-on-demand",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with ExitStack() as stack:
        stack.callback(server.stdout.close)
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert "serving 24 cases of pilot" in server.stdout.readline()

        def kill_and_start_again():
            server.kill()
            server.wait()
            stack.enter_context(Service(place.folder, offer, "127.0.0.1", free_port))

        wire = Wire(free_port, cut_after=[500_000], on_cut=kill_and_start_again)
        stack.callback(wire.close)
        assert fetch(wire.port) == 0
        assert server.returncode == -signal.SIGKILL
    assert "trying again" in capsys.readouterr().err
    assert content(tmp_path / "out") == expected


def test_a_supervisor_s_stop_is_no_error(finished, place, free_port, capsys):
    answers: list[Description] = []

    def while_served():
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", free_port)) and time.monotonic() < deadline:
            time.sleep(0.05)
        with stub_of(place, free_port, place.token) as stub:
            answers.append(stub.Describe(DescribeRequest()))
        os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=while_served)
    client.start()
    arguments = ["deliver", str(finished.path), "--folder", str(place.folder), "--no-on-demand"]
    settings = Coordinator("pilot", ["127.0.0.1"], delivery_port=free_port, folder=place.folder)
    write_coordinator(settings)
    try:
        assert server_cli.main(arguments) == 0, "at the port that the gateway knows"
    finally:
        (place.folder / COORDINATOR_FILE).unlink()
    client.join()
    assert answers[0].privacy in (shown := capsys.readouterr().out) and "epsilon 7.90 at delta 0.001" in shown


def test_a_case_that_a_power_cut_has_emptied_comes_again(service, expected, fetch, tmp_path):
    wire = Wire(service.port, cut_after=[500_000], on_cut=Arriving(tmp_path / "out"))
    assert fetch(wire.port, "--patience", 0) == 2
    wire.close()
    arrived = sorted((tmp_path / "out" / "cases").glob("*.npz"))
    assert len(arrived) >= 2
    os.truncate(arrived[1], 0)
    with (tmp_path / "out" / "arrived.jsonl").open("a") as journal:
        journal.write('{"info": {"pseudonym": "syn-')
    assert fetch(service.port) == 0
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_cases_on_demand_resume_where_they_broke(place, offer, sampler, fetch, tmp_path):
    options = ("--on-demand", 30, "--seed", 7)
    with Service(place.folder, replace(offer, sampler=sampler), "127.0.0.1", 0) as service:
        assert fetch(service.port, *options, out="expected") == 0
        wire = Wire(service.port, cut_after=[500_000, 700_000], on_cut=Arriving(tmp_path / "out"))
        try:
            assert fetch(wire.port, *options) == 0
        finally:
            wire.close()
        assert wire.num_cut == 2
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_a_folder_of_an_earlier_version_resumes_in_todays_words(place, offer, sampler, fetch, tmp_path):
    with Service(place.folder, replace(offer, sampler=sampler), "127.0.0.1", 0) as service:
        assert fetch(service.port, "--on-demand", 2) == 0
        request = tmp_path / "out" / "fetch.json"
        noted = json.loads(request.read_text())
        noted["fresh"] = noted.pop("num_on_demand")
        request.write_text(json.dumps(noted))
        assert fetch(service.port, "--fresh", 2) == 0
        assert fetch(service.port, "--fresh", 3) == 2


def test_a_folder_of_another_request_is_left_alone(service, fetch, tmp_path, capsys):
    assert fetch(service.port, "--vendor", "GE") == 0
    before = content(tmp_path / "out")
    assert fetch(service.port, "--vendor", "Philips") == 2
    assert "of another request (vendors is ['GE'] there" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert fetch(service.port, out="mine") == 2
    assert "holds other files" in capsys.readouterr().err and len(content(tmp_path / "mine")) == 1


def test_a_new_release_is_not_mixed_with_the_one_before(wire, place, offer, finished, fetch, tmp_path, capsys):
    assert fetch(wire.port, "--patience", 0) == 2
    folder = tmp_path / "synthetic"
    shutil.copytree(finished.path / "synthetic", folder)
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  dicom/new\n")
    with Service(place.folder, replace(offer, released=open_released_set(folder)), "127.0.0.1", 0) as service:
        assert fetch(service.port) == 2
    assert "release_sha256 is" in capsys.readouterr().err


def test_a_full_disk_ends_it_and_what_came_is_kept(service, expected, small_disk, fetch, tmp_path, monkeypatch, capsys):
    disk = small_disk(tmp_path / "disk")
    assert fetch(service.port, out="disk/out") == 2
    assert "MiB free for the cases" in capsys.readouterr().err, "seen before the first case"
    monkeypatch.setattr(fetching, "SLACK_BYTES", -(2**40))  # others fill the disk meanwhile
    assert fetch(service.port, out="disk/out") == 2
    assert "free space" in (shown := capsys.readouterr().err) and "Traceback" not in shown
    out = disk / "out"
    assert not list(out.rglob("*.partial"))
    arrived = {path.name: path.read_bytes() for path in (out / "cases").iterdir()}
    assert arrived and all(expected[f"cases/{name}"] == data for name, data in arrived.items())
    moved = shutil.copytree(out, tmp_path / "out")
    assert fetch(service.port) == 0
    assert content(moved) == expected


def test_two_at_once_in_one_folder_are_refused(service, fetch, tmp_path, capsys):
    assert fetch(service.port, "--vendor", "GE") == 0
    request = json.loads((tmp_path / "out" / "fetch.json").read_text())
    with ReceivedCases(tmp_path / "out", {key: value for key, value in request.items() if key != "done"}):
        assert fetch(service.port, "--vendor", "GE") == 2
    assert "is being filled by another process" in capsys.readouterr().err
