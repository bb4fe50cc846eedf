"""What dies in a deployed study, and what is refused: nothing is lost, nobody is charged twice, no other code runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedcmr.client.deployment.node_key import make_node_key
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SitePolicy, SiteSettings, write_site
from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.deployment.runs import status
from fedcmr.server.deployment.services import EXECUTOR, SECRET_NAME, SUPERLINK, running_pid
from fedcmr.server.federation.senders import FILE_NAME
from fedcmr.server.run_folder import load_run
from fedcmr.shared import checkpoint
from tests.conftest import NOMINAL_PATIENTS, write_cases
from tests.deployment.conftest import (
    PATIENCE_S,
    change_site,
    children,
    descendant,
    descendants,
    rounds,
    server,
    start_run,
    wait_for,
)

pytestmark = pytest.mark.engine

OTHER_VERSION = "0" * 64
WORKER = "fedcmr.client.deployment.preforked"
"""The pre-forked worker, and its child for every message: the ClientApp."""


def charged_rounds(folder):
    return [charge["round"] for charge in Ledger(folder / "ledger").charges()]


def test_a_study_outlives_its_superlink_and_a_supernode(deployed, tmp_path):
    """Site c has approved another version: it joins, and lets nothing run."""
    deployed.renew()
    change_site(deployed.sites["c"], policy=SitePolicy(allowed_code_sha256=[OTHER_VERSION]))
    shutil.rmtree(deployed.sites["c"] / "flwr" / "apps", ignore_errors=True)
    run = tmp_path / "run"
    waiting = ("federation.reply_timeout_s=600", "federation.min_sites=1", "evaluation.federated=true")
    settings = (*deployed.settings, "federation.num_rounds=4", *waiting)
    with deployed.joined("a", "b", "c") as joined:
        # None of them has test patients, so that nothing would come of the evaluation.
        assert server("run", deployed.folder, "--rehearsal", "--test", deployed.test, "--set", *settings) == 2
        rehearsed = json.loads((deployed.folder / "rehearsal.json").read_text())
        assert set(rehearsed["sites"]["c"]["codes"].values()) == {"code-not-allowed"} and rehearsed["unnamed"] == []
        assert len(rehearsed["reasons"]) == 1 and "no site would evaluate" in rehearsed["reasons"][0]
        first = start_run(deployed, run, "--test", deployed.test, "--set", *settings)
        wait_for(lambda: len(rounds(run)) >= 1, "the first round")
        (run / FILE_NAME).write_text("{}")  # of the time before; a run that resumes is told anew
        coordinator = load_coordinator(deployed.folder)
        os.kill(running_pid(coordinator, SUPERLINK), signal.SIGKILL)
        assert first.wait(timeout=PATIENCE_S) == 2
        assert "resumes where it stopped" in run.with_suffix(".log").read_text()
        done_before = len(rounds(run))
        assert done_before < 4

        server("stop", deployed.folder)
        assert server("start", deployed.folder) == 0
        second = start_run(deployed, run, "--resume")
        wait_for(lambda: len(rounds(run)) > done_before, "a round after the restart")
        os.kill(descendant(joined["b"].pid, "flower-supernode"), signal.SIGKILL)
        assert second.wait(timeout=PATIENCE_S) == 0, run.with_suffix(".log").read_text()[-3000:]

    assert [line["round"] for line in rounds(run)] == [1, 2, 3, 4]
    assert charged_rounds(deployed.sites["a"]) == [1, 2, 3, 4], "every round once, in spite of the restart"
    assert len(set(charged_rounds(deployed.sites["b"]))) == len(charged_rounds(deployed.sites["b"])) >= 2
    assert not (deployed.sites["c"] / "ledger").exists(), "the site was not charged"
    assert not (deployed.sites["c"] / "flwr" / "apps").exists(), "and no file of the bundle was unpacked"
    assert [line["refused"] for line in rounds(run)] == [{"c": "code-not-allowed"}] * 4, "named, though no code ran"
    assert all("c" not in line["dropped"] for line in rounds(run))
    assert "c did not take part: refused 4 rounds (code-not-allowed)." in run.with_suffix(".log").read_text()
    report = json.loads((run / "report.json").read_text())
    assert report["provenance"]["refused"] == {"c": ["code-not-allowed"]}
    assert report["privacy"]["sites"]["c"]["epsilon"] == 0 < report["privacy"]["sites"]["a"]["epsilon"]
    assert report["federated_evaluation"]["sites"]["c"]["code"] == "code-not-allowed"
    facts = status(coordinator, load_run(run))["run"]
    assert facts["refused"] == {"c": "code-not-allowed"} and facts["participation"]["attendance"]["c"]["silent"] == 0
    assert (run / "report.html").is_file()


def test_a_study_outlives_its_serverapp_and_a_clientapp(deployed, tmp_path):
    """The ServerApp dies with answers that it has not saved; the ClientApp of a site while it answers."""
    run = tmp_path / "run"
    settings = (*deployed.settings, "federation.num_rounds=5", "federation.reply_timeout_s=600")
    deployed.renew()
    a, b = deployed.sites["a"], deployed.sites["b"]
    with deployed.joined("a", "b", "c") as joined:
        first = start_run(deployed, run, "--test", deployed.test, "--set", *settings)
        executor = running_pid(load_coordinator(deployed.folder), EXECUTOR)
        wait_for(lambda: len(rounds(run)) >= 1, "a round", every_s=0.05)
        server_app = descendant(executor, "flwr-serverapp")

        def stands_still_in_a_round() -> bool:
            """Whether a site has charged a round that is not saved; nothing can be saved then, until it is killed."""
            os.kill(server_app, signal.SIGSTOP)
            if len(charged_rounds(a)) > len(rounds(run)):
                return True
            os.kill(server_app, signal.SIGCONT)
            return False

        wait_for(stands_still_in_a_round, "a round that follows another", every_s=0.05)
        os.kill(server_app, signal.SIGKILL)
        assert first.wait(timeout=PATIENCE_S) == 2
        saved = rounds(run)
        assert len(charged_rounds(a)) == len(saved) + 1 <= 5, "one was answered and not saved"

        second = start_run(deployed, run, "--resume")
        wait_for(lambda: len(rounds(run)) > len(saved), "that round again", every_s=0.05)
        wait_for(lambda: len(descendants(joined["b"].pid, WORKER)) > 1, "the ClientApp", every_s=0.01)
        os.kill(descendant(joined["b"].pid, WORKER), signal.SIGKILL)
        assert second.wait(timeout=PATIENCE_S) == 0, run.with_suffix(".log").read_text()[-3000:]

    assert [line["round"] for line in rounds(run)] == [1, 2, 3, 4, 5]
    assert rounds(run)[: len(saved)] == saved and all("a" in line["answered"] for line in rounds(run))
    assert rounds(run)[len(saved)]["answered"] == saved[-1]["answered"]
    assert charged_rounds(a) == [1, 2, 3, 4, 5], "every round once"
    assert 4 <= len(charged_rounds(b)) == len(set(charged_rounds(b)))


def test_a_slow_site_is_waited_for_as_long_as_the_setting_says(deployed, tmp_path):
    """Site c stands still in the first round, which is below its quorum then; a killed `join` leaves no SuperNode."""
    run = tmp_path / "run"
    waiting = ("federation.reply_timeout_s=90", "federation.min_sites=3")
    settings = (*deployed.settings, "federation.num_rounds=3", *waiting)
    deployed.renew()
    with deployed.joined("a", "b", "c") as joined:
        executor = descendant(joined["c"].pid, "flower-superexec")
        os.kill(executor, signal.SIGSTOP)  # its SuperNode takes the question and tells the server that it is there
        process = start_run(deployed, run, "--test", deployed.test, "--set", *settings)
        wait_for(lambda: rounds(run), "the first round")
        os.kill(executor, signal.SIGCONT)
        assert process.wait(timeout=PATIENCE_S) == 0, run.with_suffix(".log").read_text()[-3000:]
        below = children(joined["c"].pid)
        joined["c"].kill()
        wait_for(
            lambda: (
                not any(Path(f"/proc/{pid}/cmdline").exists() for pid in below if pid != joined["c"].pid)
                and joined["c"].poll() is not None
            ),
            "the end of all that the killed one had started",
        )
    assert len(below) > 3, "it, the loaded libraries, the SuperNode, the executor"
    first, _, last = rounds(run)
    assert first["answered"] == ["a", "b"] and (first["silent"], first["missing"]) == (1, 1)
    assert last["answered"] == ["a", "b", "c"] and (last["silent"], last["missing"]) == (0, 0)
    before, after = (checkpoint.load(checkpoint.round_path(run / "checkpoints", number))[0] for number in (0, 1))
    assert all((after[name] == value).all() for name, value in before.items()), "below the quorum nothing changes"
    charged = charged_rounds(deployed.sites["c"])
    assert len(set(charged)) == len(charged) and {2, 3} >= set(charged) - {1} >= {3}


def test_a_watched_service_that_ends_takes_the_other_with_it(deployed):
    """What a supervisor sees, and starts again."""
    coordinator = load_coordinator(deployed.folder)
    command = [sys.executable, "-m", "fedcmr.server.cli", "start", str(deployed.folder), "--watch"]
    for name in (SUPERLINK, EXECUTOR, None):
        server("stop", deployed.folder)
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "the SuperLink serves" in watching.stdout.readline()
        if name is None:
            watching.terminate()
            assert watching.wait(timeout=PATIENCE_S) == 0
        else:
            os.kill(running_pid(coordinator, name), signal.SIGKILL)
            assert watching.wait(timeout=PATIENCE_S) == 2
            assert f"error: {name} has ended" in watching.stderr.read()
        watching.communicate()
        assert running_pid(coordinator, SUPERLINK) is None and running_pid(coordinator, EXECUTOR) is None


def test_a_site_that_is_not_registered_gets_no_work(deployed, tiny_prior, tmp_path):
    folder = tmp_path / "stranger"
    write_cases(folder / "train", "Siemens", NOMINAL_PATIENTS, 7)
    known = deployed.sites["a"]
    write_site(
        folder,
        SiteSettings(
            "a",
            {"Siemens": NOMINAL_PATIENTS},
            NOMINAL_PATIENTS,
            prior=str(tiny_prior),
            authority=str(deployed.folder / "ca.crt"),
            coordinator=load_coordinator(deployed.folder).superlink,
            ledger_same_disk=True,
            policy=SitePolicy(allowed_code_sha256=[OTHER_VERSION]),
        ),
    )
    make_node_key(folder)
    assert (folder / "node_key.pub").read_bytes() != (known / "node_key.pub").read_bytes()
    with (folder / "join.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedcmr.client.cli", "join", str(folder)], stdout=log, stderr=log
        )
    try:
        wait_for(lambda: "not connected: " in (folder / "join.log").read_text(), "a refusal")
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert deployed.status()["sites"]["a"] != "online"


def test_an_executor_without_the_secret_gets_no_work(deployed, tmp_path):
    """Whoever has the certificate alone could otherwise take the ServerApp, with the sites' updates."""
    coordinator = load_coordinator(deployed.folder)
    (tmp_path / "guessed").write_text("0" * 64)

    def executor(secret):
        return subprocess.Popen(
            [
                Path(sys.executable).parent / "flower-superexec",
                "--root-certificates",
                coordinator.ca,
                "--runtime-api-address",
                coordinator.superlink,
                "--superexec-auth-secret-file",
                secret,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    rogue, honest = executor(tmp_path / "guessed"), executor(deployed.folder / SECRET_NAME)
    try:
        rogue.wait(timeout=PATIENCE_S)  # Flower turns it away, and it ends
        assert honest.poll() is None, "one with the secret stays and waits for work"
    finally:
        for process in (rogue, honest):
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def services_run(deployed):
    """A test may have ended with them stopped."""
    assert server("start", deployed.folder) == 0
