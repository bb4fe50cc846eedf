import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcmr.client import training
from fedcmr.client.ledger import Ledger
from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.state import (
    FederationState,
    charged_releases,
    initial_state,
    make_request,
    read_study,
)
from fedcmr.server.federation.strategy import SitesByFlower
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.privacy import epsilon
from fedcmr.simulations import grid as grid_module
from fedcmr.simulations.grid import make_grid

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SITES = ["a", "b", "c"]
PATIENCE_S = 240.0


def run_federation(run):
    with make_grid(run) as grid:
        federate(grid, run, load_prior(run.prior_path()))
    return checkpoint.load(run.path / "generator.safetensors")


def alive(pid):
    """Whether a process runs; a zombie, which only waits for its parent, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def workers():
    """Pids of this process's own workers that still run."""
    found = []
    for pid in children_of(os.getpid()):
        with contextlib.suppress(FileNotFoundError):
            if alive(pid) and b"fedcmr.simulations.processes" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def cpu_ticks(pid):
    """What a process has computed."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def test_three_sites_train_a_private_generator_through_flowers_apps(make_study):
    run = make_study("federation.adapter=norm_affine")
    arrays, metadata = run_federation(run)
    start = load_prior(run.prior_path()).generator.trainable()
    assert {name.partition("/")[2] for name in arrays if name.startswith("trainable/")} == set(start)
    assert {name for name in arrays if name.startswith("code_")} == {
        f"{kind}/{vendor}" for kind in ("code_mean", "code_std") for vendor in ("Siemens", "Philips", "GE")
    }
    assert any(np.abs(arrays[f"trainable/{name}"] - value.detach().numpy()).max() > 0 for name, value in start.items())
    assert [line["answered"] for line in run.metrics()] == [SITES] * 3
    assert all(line["bytes_up"] > 0 and line["bytes_down"] > 0 for line in run.metrics())
    for site in SITES:
        releases = Ledger(run.path / "sites" / site / "ledger").releases()
        spent, _ = epsilon(releases, 1e-3)
        assert metadata["sites"][site]["epsilon"] == pytest.approx(spent, rel=1e-9), "server and site must agree"
        assert metadata["sites"][site]["steps"] == sum(release.num_steps for release in releases) == 2 + 2 * 2


def test_without_privacy_equal_seeds_give_equal_weights_in_any_number_of_processes(make_study, tmp_path):
    results = []
    for num_processes in (1, 2):
        run = make_study(
            "privacy.enabled=false", f"federation.num_processes={num_processes}", allow_without_privacy=True
        )
        results.append(run_federation(run)[0])
        run.path.rename(tmp_path / f"done{len(results)}")
    assert set(results[0]) == set(results[1])
    for name, array in results[0].items():
        np.testing.assert_array_equal(results[1][name], array)
    assert np.abs(results[0]["trainable/class_embedding.2.lora_b"]).max() > 0  # it starts at zero
    assert not workers()


def test_too_few_patients_everywhere_end_the_run_with_a_line(make_study):
    with pytest.raises(UserError, match="a: too-few-patients"):
        run_federation(make_study(num_patients=4))


def test_a_round_in_which_the_work_of_all_sites_failed_is_lost_and_no_other(make_study, monkeypatch):
    """As after a power cut: the charge stands, its failure is final, and the study continues with the next round."""
    real = training.fine_tune

    def failing(generator, patients, arrays, mechanism, steps, *rest):
        if steps.server_round == 2:
            raise MemoryError
        return real(generator, patients, arrays, mechanism, steps, *rest)

    monkeypatch.setattr(training, "fine_tune", failing)
    run = make_study()
    _, metadata = run_federation(run)
    assert [line["answered"] for line in run.metrics()] == [SITES, [], SITES]
    assert run.metrics()[1]["refused"] == dict.fromkeys(SITES, "internal-error")
    for site in SITES:
        assert len(Ledger(run.path / "sites" / site / "ledger").charges()) == 3
        assert metadata["sites"][site]["epsilon"] == pytest.approx(
            Ledger(run.path / "sites" / site / "ledger").spent(1e-3), rel=1e-9
        )


def test_in_one_process_ctrl_c_waits_until_the_site_has_finished_and_a_second_one_does_not():
    heard = []
    with pytest.raises(KeyboardInterrupt), grid_module._interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        heard.append("finished")
    assert heard == ["finished"]
    with pytest.raises(KeyboardInterrupt), grid_module._interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        heard.append("not reached")
    assert heard == ["finished"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def gradients_of(run):
    """A grid and the messages of a round that takes long."""
    config = run.config
    prior = load_prior(run.prior_path())
    sites = read_study(run)
    state = initial_state(config, prior, sites)
    request = make_request(config, state, 2)
    grid = make_grid(run)
    return grid, SitesByFlower(grid, config.federation, len(sites), None).messages(request, state.arrays)


def test_every_task_runs_on_one_thread_and_gives_the_others_back(make_study, monkeypatch):
    seen = []
    monkeypatch.setattr(grid_module, "client_app", lambda message, context: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid, messages = gradients_of(make_study())
        list(grid.send_and_receive(messages))
        assert (seen, torch.get_num_threads()) == ([1, 1, 1], 2)
    finally:
        torch.set_num_threads(before)


LONG = ("federation.num_processes=2", "federation.num_views=16", "federation.local_steps=2000")


def test_a_late_site_is_missing_and_its_process_is_ended(make_study):
    grid, messages = gradients_of(make_study(*LONG, max_local_steps=2000))
    with grid:
        assert list(grid.send_and_receive(messages, timeout=0.5)) == []
        assert not workers()


def test_a_site_whose_process_dies_is_missing_and_answers_the_next_round(make_study):
    grid, messages = gradients_of(make_study("federation.num_processes=2", "federation.num_views=50"))

    def kill_one():
        victims = wait_until(workers)
        os.kill(victims[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    with grid:
        killer.start()
        replies = list(grid.send_and_receive(messages, timeout=PATIENCE_S))
        killer.join()
        assert len(replies) == 2
        missing = {m.metadata.dst_node_id for m in messages} - {r.metadata.src_node_id for r in replies}
        again = [message for message in messages if message.metadata.dst_node_id in missing]
        assert len(list(grid.send_and_receive(again, timeout=PATIENCE_S))) == 1
    assert not workers()


SCRIPT = """
import sys
from pathlib import Path
from fedcmr.server.federation.federate import federate
from fedcmr.shared.errors import run_command
from fedcmr.shared.models.prior import load_prior
from fedcmr.server.run_folder import load_run
from fedcmr.simulations import grid as grid_module
from fedcmr.simulations.grid import make_grid

def main():
    run = load_run(Path(sys.argv[1]))
    with make_grid(run) as grid:
        federate(grid, run, load_prior(run.prior_path()))

if __name__ == "__main__":
    sys.exit(run_command(main))
"""


@pytest.fixture
def start(tmp_path):
    """Starts the federation of a run folder in a process group of its own, as a shell does."""
    script = tmp_path / "federation.py"
    script.write_text(SCRIPT)
    started = []

    def start(run):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), str(run.path)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def children_of(pid):
    """Pids of a process's children."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_ctrl_c_leaves_no_process_and_the_same_command_finishes_without_a_second_charge(make_study, start):
    run = make_study("federation.num_processes=2", "federation.num_views=64")
    process = start(run)
    assert wait_until(lambda: checkpoint.round_path(run.path / "checkpoints", 1).exists())
    children = children_of(process.pid)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in shown and "interrupted" in shown
    assert wait_until(lambda: not any(alive(child) for child in children))
    assert not (run.path / "generator.safetensors").exists()

    run.config.federation.num_processes = 1  # only to spare this test the start of more processes
    run_federation(run)
    state = FederationState.load_newest(run.path / "checkpoints")
    assert state.server_round == 3
    for site in SITES:
        releases = Ledger(run.path / "sites" / site / "ledger").releases()
        assert releases == list(charged_releases(state.releases[site])), "no round may be charged twice"
    assert [line["answered"] for line in run.metrics()] == [SITES] * 3, "what was charged was finished, and is not lost"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_busy_workers_end_with_a_parent_that_was_killed(make_study, start):
    run = make_study(*LONG, max_local_steps=2000)
    process = start(run)
    assert wait_until(lambda: checkpoint.round_path(run.path / "checkpoints", 1).exists())
    children = children_of(process.pid)
    assert len(children) >= 2
    before = sum(map(cpu_ticks, children))
    assert wait_until(lambda: sum(map(cpu_ticks, children)) > before), "the second round's work"
    os.kill(process.pid, signal.SIGKILL)
    assert wait_until(lambda: not any(alive(child) for child in children))
