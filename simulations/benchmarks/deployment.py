"""What a round costs between institutions beyond its training: `python -m fedcmr.simulations.benchmarks.deployment`.

One small study, three times on this machine: in one process tree (`fedcmr.simulations.grid`), and through SuperLink and
three SuperNodes over TLS, with the pre-forked worker (`fedcmr-client join`) and without (`--cold`). What a deployed
round takes beyond one in the process tree is the engine's overhead: the imports of a process that starts for every
message, and Flower's pauses between two requests.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedcmr.client.code_hash import code_sha256
from fedcmr.client.deployment.node_key import make_node_key
from fedcmr.client.policy import SitePolicy, SiteSettings, write_site
from fedcmr.server.deployment.authority import issue_server_certificate, make_authority
from fedcmr.server.deployment.coordinator import Coordinator, register_site, write_coordinator
from fedcmr.server.deployment.runs import make_run, run_study, status
from fedcmr.server.deployment.services import start, stop
from fedcmr.server.federation.state import StudySite
from fedcmr.server.run_folder import load_run
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.free_ports import free_ports
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.scale import NUM_PATIENTS, SETTINGS, shared_cases, write_study
from fedcmr.simulations.grid import make_grid, run_server_app

NUM_SITES, NUM_ROUNDS = 3, 16
"""With few rounds a median is chance: Flower's pauses make one round a second longer than the next."""
ONLINE_S = 300.0
IN_PROCESS, WORKER, COLD = "one process tree", "deployed, pre-forked worker", "deployed, --cold"


def main() -> int:
    """Run the three studies, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.deployment", description=__doc__)
    add_version(parser)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = shared_cases(folder)
        seconds = {IN_PROCESS: in_process(folder / "grid", cases)}
        for name, flags in ((WORKER, []), (COLD, ["--cold"])):
            seconds[name] = deployed(folder / name.split()[-1].strip("-"), cases, flags)
    table = Table("engine", "s a round", "beyond one process tree, s", title=f"{NUM_SITES} sites, median of the rounds")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}", "" if name == IN_PROCESS else f"{value - seconds[IN_PROCESS]:.1f}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(table)
    if options.json:
        write_atomically(options.json, (json.dumps(seconds, indent=2) + "\n").encode())


def in_process(folder: Path, cases: Path) -> float:
    """Median seconds of a round in one process tree."""
    run = load_run(write_study(folder, cases, NUM_SITES, NUM_ROUNDS))
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve())})
    return round_seconds(run.path)


def deployed(folder: Path, cases: Path, flags: list[str]) -> float:
    """Median seconds of a round through Flower's deployment engine."""
    port, health_port = free_ports(2)
    coordinator = Coordinator("benchmark", ["127.0.0.1"], port, health_port, folder=folder / "coordinator")
    coordinator.folder.mkdir(parents=True)
    make_authority(coordinator.folder, coordinator.name)
    issue_server_certificate(coordinator.folder, coordinator.addresses)
    write_coordinator(coordinator)
    policy = SitePolicy(min_patients=1, allowed_code_sha256=[code_sha256()])
    sites = [folder / f"site-{number}" for number in range(NUM_SITES)]
    for site in sites:
        facts = StudySite({"GE": NUM_PATIENTS}, NUM_PATIENTS)
        settings = SiteSettings(
            site.name,
            facts.vendors,
            facts.nominal_patients,
            data=str(cases),
            coordinator=coordinator.superlink,
            authority=str(coordinator.ca),
            ledger_same_disk=True,
            policy=policy,
        )
        write_site(site, settings)
        key = make_node_key(site).read_text(encoding="utf-8")
        register_site(coordinator, site.name, key, facts)
    run = folder / "run"
    try:
        start(coordinator)
        with _joined(sites, flags):
            deadline = time.monotonic() + ONLINE_S
            while set(status(coordinator, None)["sites"].values()) != {"online"}:
                if time.monotonic() > deadline:
                    raise UserError(f"no site came online within {ONLINE_S:.0f} s: see {sites[0] / 'join.log'}")
                time.sleep(1)
            make_run(coordinator, run, "smoke", [*SETTINGS, f"federation.num_rounds={NUM_ROUNDS}"], [cases])
            run_study(coordinator, run)
    finally:
        stop(coordinator)
    return round_seconds(run)


def round_seconds(run: Path) -> float:
    """Median seconds of the rounds after the first, which requests something else."""
    lines = load_run(run).rounds()
    return statistics.median(line["elapsed_s"] for line in lines[1:])


@contextmanager
def _joined(sites: list[Path], flags: list[str]) -> Iterator[None]:
    """`fedcmr-client join` of every site, ended with the block."""
    processes = []
    try:
        for site in sites:
            with (site / "join.log").open("wb") as log:
                command = [sys.executable, "-m", "fedcmr.client.cli", "join", str(site), *flags]
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
                )
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
