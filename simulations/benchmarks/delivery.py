"""Delivery of many cases: speed and memory. `python -m fedcmr.simulations.benchmarks.delivery [--cases 10000]`.

The real service and the real `fedcmr-client fetch`, each in its process, over TLS on this machine. Memory is what the
processes hold (resident, without the files that the kernel caches), measured at every thousandth case: flat means
that the last number is not larger than the first. The cases share their images and differ in name and row.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedcmr.server.delivery.tokens import issue_token
from fedcmr.server.deployment.authority import issue_server_certificate, make_authority, write_secret
from fedcmr.server.settings import dump, load
from fedcmr.shared import checkpoint
from fedcmr.shared.case import ED, LV, MYO, Case, CaseInfo, save_case, write_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.file_names import CHECKSUMS_NAME, DATASHEET_NAME
from fedcmr.shared.version import add_version

VENDORS = ("GE", "Philips", "Siemens")
NUM_CASES, NUM_MEASUREMENTS = 10_000, 10
NUM_SLICES, SIZE = 2, 96
MAX_GROWTH_MIB = 16.0
"""Limit for both processes from the first tenth of the cases to the last; the client's list of names takes a few."""
KIB_PER_MIB, POLL_S = 1024, 0.02


@dataclass(frozen=True)
class Measurement:
    """Memory when so many cases had come.

    Attributes:
        cases: Cases that were in the folder.
        server_mib: Resident memory of the service.
        client_mib: Resident memory of the client.
        elapsed_s: Time since the client started.
    """

    cases: int
    server_mib: float
    client_mib: float
    elapsed_s: float


def main() -> int:
    """Measure, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.delivery", description=__doc__)
    add_version(parser)
    parser.add_argument("--cases", type=int, default=NUM_CASES, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    if options.cases < NUM_MEASUREMENTS:
        raise UserError(f"Expected --cases >= {NUM_MEASUREMENTS}, got {options.cases}.")
    with tempfile.TemporaryDirectory() as temporary:
        measurements = measure(Path(temporary), options.cases)
    table = Table("cases", "s", "cases/s", "service, MiB", "client, MiB")
    for one in measurements:
        table.add_row(
            str(one.cases),
            f"{one.elapsed_s:.1f}",
            f"{one.cases / one.elapsed_s:.0f}",
            f"{one.server_mib:.0f}",
            f"{one.client_mib:.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    growths = growth_mib(measurements)
    met = "met" if max(growths) <= MAX_GROWTH_MIB else "missed"
    console.print(
        f"required: at most {MAX_GROWTH_MIB:g} MiB more than after the first tenth of the cases; {met}: "
        f"service {growths[0]:+.1f}, client {growths[1]:+.1f}"
    )
    if options.json:
        write_atomically(options.json, json.dumps([asdict(one) for one in measurements], indent=2).encode())


def growth_mib(measurements: list[Measurement]) -> tuple[float, float]:
    """By how much service and client grew from the first measurement to their largest."""
    return (
        max(one.server_mib for one in measurements) - measurements[0].server_mib,
        max(one.client_mib for one in measurements) - measurements[0].client_mib,
    )


def measure(folder: Path, num_cases: int, num_measurements: int = NUM_MEASUREMENTS) -> list[Measurement]:
    """Deliver so many cases once.

    Args:
        folder: Empty; takes the cases twice.
        num_cases: At least `num_measurements`.
        num_measurements: How often memory is measured, evenly over the cases.

    Returns:
        Shape (num_measurements,); the last one has the client's most until its end.
    """
    run, coordinator = write_run(folder / "many", num_cases), folder / "coordinator"
    coordinator.mkdir()
    make_authority(coordinator, "many")
    issue_server_certificate(coordinator, ["127.0.0.1"])
    write_secret(folder / "token", issue_token(coordinator, "benchmark").encode())
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fedcmr.server.cli",
            "deliver",
            str(run),
            "--folder",
            str(coordinator),
            "--port",
            "0",
            "--no-on-demand",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise UserError("the service did not start: its error is above")
        port = line.partition("127.0.0.1:")[2].partition(";")[0]
        out, started = folder / "out", time.monotonic()
        client = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fedcmr.client.cli",
                "fetch",
                str(out),
                "--from",
                f"127.0.0.1:{port}",
                "--ca",
                str(coordinator / "ca.crt"),
                "--token-file",
                str(folder / "token"),
            ],
            stdout=subprocess.DEVNULL,
        )
        measurements = []
        for number in range(1, num_measurements + 1):
            last = f"p{number * num_cases // num_measurements - 1:06d}"
            while client.poll() is None and not (out / "cases" / f"{last}.npz").exists():
                time.sleep(POLL_S)
            measurements.append(
                Measurement(
                    number * num_cases // num_measurements,
                    _resident_mib(server.pid),
                    _resident_mib(client.pid),
                    time.monotonic() - started,
                )
            )
        largest = measurements[-1].client_mib  # while it writes index and checksums
        while client.poll() is None:
            largest = max(largest, _resident_mib(client.pid))
            time.sleep(POLL_S)
        measurements[-1] = replace(measurements[-1], client_mib=largest)
        if client.returncode != 0:
            raise UserError("the client failed: its error is above")
        _check(run / "synthetic", out, num_cases)
        return measurements
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


def write_run(path: Path, num_cases: int) -> Path:
    """A run folder whose released set has so many cases, all of one file by hard links."""
    released = path / "synthetic"
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2.0
    masks = np.zeros((2, NUM_SLICES, SIZE, SIZE), np.uint8)
    for phase, radius in enumerate((14, 10)):
        masks[phase][:, np.hypot(y, x) < radius + 6] = MYO
        masks[phase][:, np.hypot(y, x) < radius] = LV
    rng = np.random.default_rng(0)
    frames = (masks / LV * 0.8 + rng.uniform(0, 0.2, masks.shape)).astype(np.float32)
    frames[ED] = frames[ED].clip(0, 1)
    infos = [
        CaseInfo(f"p{i:06d}", VENDORS[i % 3], float("nan"), 0.1 + 0.7 * i / num_cases, f"p{i:06d}")
        for i in range(num_cases)
    ]
    first = save_case(released, Case(infos[0], frames.clip(0, 1), masks, np.array([10, 1.5, 1.5], np.float32)))
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    for info in infos[1:]:
        (first.parent / f"{info.pseudonym}.npz").hardlink_to(first)
    write_index(released, infos)
    (released / DATASHEET_NAME).write_text("# Of a benchmark\n", encoding="utf-8")
    sums = {f"cases/{info.pseudonym}.npz": digest for info in infos}
    for name in ("cases.csv", DATASHEET_NAME):
        sums[name] = hashlib.sha256((released / name).read_bytes()).hexdigest()
    (released / CHECKSUMS_NAME).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    (path / "config.yaml").write_text(dump(load("default", [])), encoding="utf-8")
    site = {"epsilon": 8.0, "accountant": "prv", "steps": 1, "refused": []}
    checkpoint.save(
        path / "generator.safetensors",
        {"x": np.zeros(1, np.float32)},
        {"prior_sha256": "", "delta": 1e-3, "sites": {"a": site}},
    )
    return path


def _check(sent: Path, got: Path, num_cases: int) -> None:
    """What was measured is a delivery: the client's own checksums are those of the release."""
    same = (sent / CHECKSUMS_NAME).read_text() == (got / CHECKSUMS_NAME).read_text()
    if not same or len(list((got / "cases").iterdir())) != num_cases:
        raise UserError(f"{got} is not what was sent")


def _resident_mib(pid: int) -> float:
    """Anonymous resident memory of a process; 0 for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:")]
    return found[0] / KIB_PER_MIB if found else 0.0


if __name__ == "__main__":
    raise SystemExit(main())
