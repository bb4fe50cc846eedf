"""What policy and ledger cost a site: `python -m fedcmr.simulations.benchmarks.ledger [--folder DIR] [--json PATH]`.

Milliseconds per round for all that a site does besides reading its cases and training: settings and policy, the data
set's key, the code's fingerprint, the charge with its accountant, the reply that is kept. Rounds of the
default study on a new ledger, and on one that has seen earlier studies, each with noise of its own. Every write waits
for the disk, so give the one that the ledger will be on as `--folder`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from fedcmr.client import ledger as client_ledger
from fedcmr.client.code_hash import sha256_of
from fedcmr.client.ledger import Ledger, dataset_of
from fedcmr.client.policy import SitePolicy, SiteSettings, load_site, refusal, write_site
from fedcmr.server.federation.adapters import plan_adapter
from fedcmr.server.settings import load
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import run_command
from fedcmr.shared.privacy import Mechanism, Release
from fedcmr.shared.privacy_filter import PrivacyFilter
from fedcmr.shared.records import GRADIENTS, STATISTICS
from fedcmr.shared.version import add_version

MAX_MS = 50.0
"""Longest time of a round, required."""
NUM_STUDIES = (0, 10)
"""Earlier studies in the ledger."""
NUM_REPEATS = 5
REPLY_BYTES = 6000
"""Size of a site's update in the default study."""
PARTS = ("policy", "accountant", "ledger", "whole round", "processor")
"""The last is processor time of the whole round: next to other work, or on a slow disk, the round takes longer."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.ledger", description=__doc__)
    add_version(parser)
    parser.add_argument("--folder", type=Path, help="where to put the ledger (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    figures: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]}, "max_ms": MAX_MS}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for num_studies in NUM_STUDIES:
            figures[f"{num_studies} earlier studies"] = round_ms(Path(folder) / str(num_studies), num_studies)
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2) + "\n").encode())


def round_ms(folder: Path, num_studies: int, num_repeats: int = NUM_REPEATS) -> dict[str, float]:
    """Medians over the rounds of `num_repeats` studies that follow on `num_studies` earlier ones; by part, in ms."""
    policy = SitePolicy(max_epsilon=1e6, allowed_code_sha256=["0" * 64])
    write_site(folder, SiteSettings("site", {"GE": 40}, 40, policy=policy))
    for study in range(num_studies):
        for server_round, release in enumerate(study_releases(7.9 - study / 10), start=1):
            answer_round(folder, f"{study:08x}", server_round, release)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    # The first study warms up; the others differ in nothing but their name, as a new seed of one study does.
    for repeat in range(num_repeats + 1):
        for server_round, release in enumerate(study_releases(8.0), start=1):
            spent = answer_round(folder, f"{1000 + repeat:08x}", server_round, release)
            if repeat > 0:
                for part in PARTS:
                    seconds[part].append(spent[part])
    return {part: 1000 * statistics.median(values) for part, values in seconds.items()}


def study_releases(target_epsilon: float) -> list[Release]:
    """What the rounds of the default study charge."""
    config = load("default", [])
    num_steps = (config.federation.num_rounds - 1) * config.federation.local_steps
    plan = plan_adapter("norm_affine", replace(config.privacy, target_epsilon=target_epsilon), num_steps)
    gradients = replace(plan[GRADIENTS], num_steps=config.federation.local_steps)
    return [plan[STATISTICS]] + [gradients] * (config.federation.num_rounds - 1)


def answer_round(folder: Path, run_id: str, server_round: int, release: Release) -> dict[str, float]:
    """One round as the ClientApp goes through it, without cases and training; seconds by part."""
    clock = dict.fromkeys(PARTS, 0.0)
    started = time.process_time()
    with _timed(clock, "whole round"):
        with _timed(clock, "policy"):
            site = load_site(folder)
            code = sha256_of(Path(client_ledger.__file__).parents[1])  # a client's process is new in every round
            dataset = dataset_of(site.data_path)
            mechanism = Mechanism(**asdict(release), max_grad_norm=1.0, target_delta=1e-3)
            refused = refusal(site.policy, mechanism, num_patients=40)
            assert refused is None and code
        accountant = _timing(clock, "accountant", PrivacyFilter.epsilon)
        with _timed(clock, "ledger"), mock.patch.object(PrivacyFilter, "epsilon", accountant):
            ledger = Ledger(site.ledger_path, site.replica_path, dataset, asdict(site.policy))
            key = (run_id, server_round)
            assert ledger.cached_reply(*key, release) is None
            ledger.reserve(*key, release, 1e-3, site.policy.max_epsilon)
            ledger.commit(*key, os.urandom(REPLY_BYTES))
    clock["ledger"] -= clock["accountant"]
    clock["processor"] = time.process_time() - started
    return clock


@contextmanager
def _timed(clock: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    clock[part] += time.perf_counter() - started


def _timing(clock: dict[str, float], part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to a part."""

    def timed(*args: Any) -> Any:
        with _timed(clock, part):
            return function(*args)

    return timed


def _print(figures: dict[str, Any]) -> None:
    """A row per ledger."""
    table = Table("milliseconds per round", *PARTS)
    for name, values in figures.items():
        if name.endswith("studies"):
            table.add_row(name, *(f"{values[part]:.1f}" for part in PARTS))
    console = Console(highlight=False)
    console.print(table)
    worst = max(values["whole round"] for name, values in figures.items() if name.endswith("studies"))
    console.print(f"required: under {MAX_MS:.0f} ms; {'met' if worst < MAX_MS else 'missed'} with {worst:.1f} ms")


if __name__ == "__main__":
    raise SystemExit(main())
