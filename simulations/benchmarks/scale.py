"""Time and memory of the server by number of sites: `python -m fedcmr.simulations.benchmarks.scale [--sites 3,10]`.

Each study runs under Flower's own simulation (SuperLink, Ray, the real ClientApp and ServerApp). All sites share two
prepared patients and differ in name, policy and ledger, so that a round costs the server what so many hospitals would
send and this machine as little as it can. `round` is the median of a study's rounds; what the sites compute in it is
shared by this machine's cores here, and would run side by side at hospitals. The server's memory is the most of the
whole study, to which the ResNet50's training after the rounds belongs.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.policy import SitePolicy, SiteSettings, write_site
from fedcmr.server.federation import state
from fedcmr.server.run_folder import load_run, open_run
from fedcmr.server.settings import load
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.stages import memory_kb
from fedcmr.simulations.flower_engine import Engine, simulating_superlink
from fedcmr.simulations.hospital import write_hospital

SITES = (3, 10, 30, 100)
NUM_PATIENTS, NUM_ROUNDS = 2, 4
SETTINGS = (
    "federation.local_steps=1",
    "federation.num_views=1",
    "federation.adapter=lora",
    "synthesis.num_cases=2",
    "synthesis.num_slices=3",
    "synthesis.num_steps=1",
    "regression.num_steps=1",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "evaluation.baselines=[]",
    "evaluation.num_bootstrap=100",
    "device=cpu",
)
SAMPLE_INTERVAL_S = 0.25
EXTRAPOLATED = 1000
MIB = 1024


@dataclass(frozen=True)
class Figures:
    """One study.

    Attributes:
        sites: How many.
        round_s: Median seconds of a round.
        server_mib: Most memory of the process with the ServerApp.
        all_mib: Most memory of all processes together, the simulated sites' among them.
        bytes_per_site: Up and down in a round, the larger of both.
    """

    sites: int
    round_s: float
    server_mib: float
    all_mib: float
    bytes_per_site: int


def main() -> int:
    """Run the studies, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.scale", description=__doc__)
    add_version(parser)
    parser.add_argument("--sites", default=",".join(map(str, SITES)), metavar="N,N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    try:
        numbers = sorted({int(text) for text in options.sites.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise UserError(f"Expected --sites to be whole numbers from 1, such as 3,10,30; got {options.sites!r}.")
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = shared_cases(folder)
        for number in numbers:
            figures.append(measure(folder / f"{number}", cases, number))
            print(f"{number} sites: {figures[-1].round_s:.1f} s a round", file=sys.stderr)
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps([asdict(row) for row in figures], indent=2) + "\n").encode())


def shared_cases(folder: Path) -> Path:
    """Two prepared patients of a simulated hospital."""
    write_hospital(folder / "export", "GE", NUM_PATIENTS, num_slices=6, num_phases=8, seed=0, prefix="scale")
    prepare(folder / "export", folder / "cases", "dicom", key=b"scale" * 8)
    return folder / "cases"


def measure(folder: Path, cases: Path, num_sites: int) -> Figures:
    """Run one study of so many sites under Flower's simulation."""
    run = write_study(folder / "run", cases, num_sites)
    with simulating_superlink(folder) as engine, _Memory(engine) as memory:
        shown = engine.run(run, num_sites, os.cpu_count() or 1)
    lines = load_run(run).rounds()
    complete = [line for line in lines if len(line["answered"]) == num_sites]
    if len(complete) < len(lines) or not lines:
        raise UserError(f"a study of {num_sites} sites did not end as it should: {shown[-500:].strip()}")
    return Figures(
        num_sites,
        # The first round requests style statistics and pays for the start of the sites' processes.
        statistics.median(line["elapsed_s"] for line in lines[1:]),
        memory.server_kb / MIB,
        memory.all_kb / MIB,
        max(max(line["bytes_up"], line["bytes_down"]) for line in lines) // num_sites,
    )


def write_study(run: Path, cases: Path, num_sites: int, num_rounds: int = NUM_ROUNDS) -> Path:
    """A run folder whose sites share the cases."""
    opened = open_run(run, load("smoke", [*SETTINGS, f"federation.num_rounds={num_rounds}"]))
    names = [f"site-{number:04d}" for number in range(num_sites)]
    policy = SitePolicy(min_patients=1)
    for name in names:
        write_site(
            run / "sites" / name, SiteSettings(name, {"GE": NUM_PATIENTS}, NUM_PATIENTS, data=str(cases), policy=policy)
        )
    state.write_study(opened, {name: state.StudySite({"GE": NUM_PATIENTS}, NUM_PATIENTS) for name in names})
    (run / "test").mkdir()
    (run / "test" / "hospitals").symlink_to(cases, target_is_directory=True)
    return run


class _Memory:
    """Watches an engine's processes from a thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.server_kb, self.all_kb = engine, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.all_kb = max(self.all_kb, memory_kb(self.engine.pid))
            self.server_kb = max([self.server_kb, *map(_resident_kb, _serverapps(self.engine.pid))])
            time.sleep(SAMPLE_INTERVAL_S)


def _serverapps(pid: int) -> list[int]:
    """The processes below an engine that run the ServerApp."""
    found, open_pids = [], [pid]
    while open_pids:
        current = open_pids.pop()
        try:
            if b"flwr-simulation" in Path(f"/proc/{current}/cmdline").read_bytes():
                found.append(current)
            for task in Path(f"/proc/{current}/task").iterdir():
                open_pids += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
    return found


def _resident_kb(pid: int) -> int:
    """Resident memory of one process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
    except OSError:
        return 0


def _print(figures: list[Figures]) -> None:
    table = Table(
        "sites",
        "s a round",
        "server, MiB",
        "all processes, MiB",
        "kB a site and round",
        title="Flower's simulation on this machine",
    )
    for row in figures:
        table.add_row(
            str(row.sites),
            f"{row.round_s:.1f}",
            f"{row.server_mib:.0f}",
            f"{row.all_mib:.0f}",
            f"{row.bytes_per_site / 1000:.0f}",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if len(figures) > 1:
        sites = [row.sites for row in figures]
        for name, unit, values in (
            ("a round", "s", [row.round_s for row in figures]),
            ("the server's memory", "MiB", [row.server_mib for row in figures]),
        ):
            slope, start = np.polyfit(sites, values, 1)
            if slope <= 0:
                console.print(f"{name}: does not grow with the sites, {max(values):.0f} {unit} at most")
                continue
            console.print(
                f"{name}: {start:.3g} {unit} + {slope:.3g} {unit} a site by a straight line; "
                f"{EXTRAPOLATED} sites would take {start + EXTRAPOLATED * slope:.0f} {unit}"
            )


if __name__ == "__main__":
    sys.exit(main())
