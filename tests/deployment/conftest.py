"""A study between institutions on this machine: Flower's SuperLink over TLS, and three sites that join it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedcmr.client.code_hash import code_sha256
from fedcmr.client.deployment.node_key import make_node_key
from fedcmr.client.deployment.supernode import ONLINE
from fedcmr.client.policy import SitePolicy, SiteSettings, load_site, write_site
from fedcmr.server import cli as server_cli
from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.deployment.runs import status
from fedcmr.server.deployment.services import start_time
from fedcmr.server.run_folder import CONFIG_NAME, load_run
from tests.conftest import NOMINAL_PATIENTS, VENDORS, write_cases

SETTINGS = (
    "device=cpu",
    "federation.num_rounds=2",
    "federation.num_views=1",
    "federation.local_steps=1",
    "federation.adapter=norm_affine",
    "synthesis.num_cases=6",
    "synthesis.num_slices=3",
    "synthesis.num_steps=1",
    "regression.num_steps=2",
    "regression.batch_size=4",
    "regression.num_tta=1",
    "evaluation.baselines=[]",
    "evaluation.num_bootstrap=100",
)
ONLINE_S = 240.0
PATIENCE_S = 400.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server(*arguments) -> int:
    return server_cli.main([str(argument) for argument in arguments])


@dataclass
class Study:
    """A coordinator's folder, its sites' folders, test patients, and the prior they all use."""

    folder: Path
    sites: dict[str, Path]
    test: Path
    prior: Path

    @property
    def settings(self) -> list[str]:
        return [f"prior={self.prior}", *SETTINGS]

    def status(self) -> dict:
        return status(load_coordinator(self.folder), None)

    def renew(self, **policy) -> None:
        """Sites that have spent nothing, with this policy."""
        for folder in self.sites.values():
            shutil.rmtree(folder / "ledger", ignore_errors=True)
            (folder / "ledger.replica").unlink(missing_ok=True)
            change_site(folder, ledger="ledger", policy=SitePolicy(allowed_code_sha256=[code_sha256()], **policy))

    @contextmanager
    def joined(self, *names):
        """`fedcmr-client join` of these sites, online; ended with the block."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = {}
        try:
            for name in names:
                with (self.sites[name] / "join.log").open("wb") as log:
                    command = [sys.executable, "-m", "fedcmr.client.cli", "join", str(self.sites[name])]
                    running[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            wait_online(*(self.sites[name] / "join.log" for name in names))
            yield running
        finally:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                process.kill()


@pytest.fixture(scope="session")
def deployed(tmp_path_factory, tiny_prior):
    """The services run, three sites are registered; nobody has joined."""
    root = tmp_path_factory.mktemp("deployed")
    folder, port = root / "coordinator", free_port()
    assert (
        server(
            "init", folder, "--name", "loopback", "--address", "127.0.0.1", "--port", port, "--health-port", free_port()
        )
        == 0
    )
    sites = {}
    for seed, (name, vendor) in enumerate(VENDORS.items()):
        sites[name] = root / "sites" / name
        write_cases(sites[name] / "train", vendor, NOMINAL_PATIENTS, seed)
        policy = SitePolicy(allowed_code_sha256=[code_sha256()])
        write_site(
            sites[name],
            SiteSettings(
                name,
                {vendor: NOMINAL_PATIENTS},
                NOMINAL_PATIENTS,
                prior=str(tiny_prior),
                coordinator=f"127.0.0.1:{port}",
                authority=str(folder / "ca.crt"),
                ledger_same_disk=True,
                policy=policy,
            ),
        )
        public = make_node_key(sites[name])
        assert (
            server(
                "register", folder, public, "--name", name, "--vendor", vendor, "--nominal-patients", NOMINAL_PATIENTS
            )
            == 0
        )
    write_cases(root / "patients", "GE", 5, seed=9)  # fewer real patients have no figures
    try:
        assert server("start", folder) == 0
        yield Study(folder, sites, root / "patients", tiny_prior)
    finally:
        server("stop", folder)


def wait_online(*logs: Path, told: str = ONLINE) -> None:
    """Until each of these sites tells that the SuperLink has taken it in; asking `flwr` for them takes seconds.

    A SuperNode without `join` has words of its own, its number.
    """
    deadline = time.monotonic() + ONLINE_S
    while not all(told in log.read_text() for log in logs):
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
        time.sleep(0.2)


def wait_for(condition, what, every_s=0.5):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(every_s)


def start_run(study, run, *options):
    """`fedcmr-server run` in a process of its own, with its output in a file next to the run folder."""
    command = [sys.executable, "-m", "fedcmr.server.cli", "run", study.folder, "--out", run, *options]
    with run.with_suffix(".log").open("a") as log:
        return subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)


def rounds(run):
    """The lines of the rounds so far."""
    return load_run(run).rounds() if (run / CONFIG_NAME).is_file() else []


def change_site(folder: Path, **changes) -> None:
    """Write a site's settings anew."""
    settings = replace(load_site(folder), **changes)
    (folder / "site.yaml").unlink()
    write_site(folder, settings)


def children(pid):
    """A process's descendants, by command."""
    found, open_pids = {}, [pid]
    while open_pids:
        current = open_pids.pop()
        try:
            for task in Path(f"/proc/{current}/task").iterdir():
                open_pids += [int(child) for child in (task / "children").read_text().split()]
            found[current] = Path(f"/proc/{current}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
    return found


def descendants(pid, command):
    """The descendants of a process that run this command, the newest last: by time, as numbers start again."""
    found = [number for number, words in children(pid).items() if any(word.endswith(command) for word in words)]
    started = {number: ticks for number in found if (ticks := start_time(number)) is not None}
    return sorted(started, key=lambda number: int(started[number]))


def descendant(pid, command):
    """The newest of them, or None."""
    return next(reversed(descendants(pid, command)), None)
