"""Cost of privacy, traffic and generation: `python -m fedcmr.simulations.benchmarks.cost [--prior PATH] [--json PATH]`.

A private step is timed against two peers on the same parameters, patients and number of views, in turns, so that a
machine that slows down slows all three: the same loop over patients without noise, and one plain batch of all
views, which is how one would train without any thought of privacy. The patients are simulated: no data is needed.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedcmr.client.training import Patient, patient_gradient, patient_of
from fedcmr.server.federation.round import run_round
from fedcmr.server.federation.state import FederationState, StudySite, initial_state, make_request
from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.settings import Config, load
from fedcmr.shared.adapters import ADAPTERS, Adapter
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import run_command
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.records import pack_request
from fedcmr.shared.version import add_version
from fedcmr.simulations.in_process import SitesInProcess

NUM_PATIENTS = 10
"""A site's patients in the timed step: a quarter of the default study's, for all times grow with their number."""
GRADIENT_ADAPTERS = tuple(adapter for adapter in ADAPTERS if adapter != "statistics")
NUM_REPEATS = 5
NUM_CASES = 40
"""Synthetic patients that are timed, after a few that are not."""
NOISE_MULTIPLIER = 3.0
"""About that of the default study; the time does not depend on it."""
MAX_STEP_RATIO, MAX_BYTES, MAX_PAIR_SECONDS = 1.15, 1_000_000, 0.08
CPU, SITE = torch.device("cpu"), "site"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.cost", description=__doc__)
    add_version(parser)
    parser.add_argument("--prior", type=Path, help="public prior (default: the one that ships with the project)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    config = load("default", ["device=cpu"])
    prior = load_prior(options.prior)
    patients = simulated_patients(NUM_PATIENTS, prior, config.synthesis.num_slices)
    memory: dict[str, int] = {}  # in this order: the peak only ever grows, and the large batch comes last
    sizes = {adapter: bytes_per_round(prior, patients, config, adapter) for adapter in GRADIENT_ADAPTERS}
    memory["a site's rounds"] = peak_memory_mb()
    made = pair_seconds(prior, config)
    memory["and generation"] = peak_memory_mb()
    figures = {
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "private_step": {adapter: step_seconds(prior, patients, config, adapter) for adapter in GRADIENT_ADAPTERS},
        "bytes_per_site_and_round": sizes,
        "generation": made,
        "peak_memory_mb": memory,
    }
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2) + "\n").encode())


def simulated_patients(num: int, prior: Prior, num_slices: int) -> list[Patient]:
    """Patients as a site's cases would give them, from drawn hearts."""
    rng = torch.Generator().manual_seed(0)
    hearts = draw_hearts(num, rng, num_slices)
    d = distances(hearts, slice_positions(hearts, num_slices), prior.grid)
    stacks = zip(render(hearts, d, rng), masks_from(d), strict=True)
    return [patient_of(f"p{number}", images, masks, prior) for number, (images, masks) in enumerate(stacks)]


def step_seconds(
    prior: Prior, patients: list[Patient], config: Config, adapter: Adapter, num_repeats: int = NUM_REPEATS
) -> dict[str, Any]:
    """Medians of the seconds of a private step and of both peers, and the ratios of these medians."""
    settings, state, sites = study_of_one_site(prior, patients, config, adapter)
    request, start = make_request(settings, state, 2, sites), state.arrays
    private = mechanism(config, len(patients))
    everybody = Patient(
        "all",
        torch.cat([patient.images for patient in patients]),
        torch.cat([patient.masks for patient in patients]),
        torch.stack([patient.styles for patient in patients]).mean(0),
        torch.cat([patient.vendors for patient in patients]),
    )
    num_views = config.federation.num_views * len(patients)

    def loop(how: Mechanism) -> Callable[[], object]:
        there = SitesInProcess(prior, {SITE: patients}, sites, CPU, lambda *_: how)
        return lambda: there.train(request, start)

    def one_batch() -> object:
        with prior.generator.holding({name: torch.from_numpy(array) for name, array in start.items()}) as parameters:
            return patient_gradient(prior.generator, everybody, num_views, 0, list(parameters.values()))

    ways = {"private": loop(private), "per_patient": loop(replace(private, private=False)), "one_batch": one_batch}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(num_repeats + 1):
        for name, way in ways.items():
            elapsed = seconds_of(way)
            if repeat > 0:  # the first of each warms up
                seconds[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "patients": len(patients),
        "views_per_patient": config.federation.num_views,
        "parameters": sum(array.size for array in start.values()),
        "seconds": medians,
        "seconds_of_every_repeat": seconds,
        "ratio_to_per_patient": medians["private"] / medians["per_patient"],
        "ratio_to_one_batch": medians["private"] / medians["one_batch"],
    }


def bytes_per_round(
    prior: Prior, patients: list[Patient], config: Config, adapter: Adapter
) -> dict[str, dict[str, int]]:
    """Bytes of the server's request and of a site's whole reply, by task, as the wire format packs them."""
    settings, state, sites = study_of_one_site(prior, patients, config, adapter)
    there = SitesInProcess(prior, {SITE: patients}, sites, CPU)
    sizes = {}
    for _ in range(2):  # the style statistics, then gradients
        arrays = state.arrays
        state, happened = run_round(state, sites, settings, there.train)
        (reply,) = happened.replies.replies
        content = {"down": pack_request(arrays, happened.request), "up": reply.content or {}}
        sizes[happened.request.task] = {
            direction: sum(record.count_bytes() for record in records.values())
            for direction, records in content.items()
        }
    return sizes


def pair_seconds(prior: Prior, config: Config, num_cases: int = NUM_CASES) -> dict[str, float]:
    """Seconds of everything that makes an ED/ES pair: shape, guide and the generator's calls."""
    settings = replace(config.synthesis, num_cases=num_cases)

    def generate() -> None:
        synthesize(prior, None, settings, config.hospitals.vendors, config.seed, "cpu", "timing the generator")

    synthesize(prior, None, replace(settings, num_cases=2), config.hospitals.vendors, config.seed, "cpu", "warming up")
    elapsed = seconds_of(generate)
    num_pairs = num_cases * settings.num_slices
    return {"pairs": num_pairs, "sampler_steps": settings.num_steps, "seconds_per_pair": elapsed / num_pairs}


def study_of_one_site(
    prior: Prior, patients: list[Patient], config: Config, adapter: Adapter
) -> tuple[Config, FederationState, dict[str, StudySite]]:
    """Settings, state and sites of a study of one step a round, before its first round.

    It is one without privacy: planning the noise takes long and changes no size. What is timed has its own mechanism.
    """
    settings = replace(
        config,
        privacy=replace(config.privacy, enabled=False),
        federation=replace(config.federation, adapter=adapter, local_steps=1),
    )
    sites = {SITE: StudySite({"Siemens": len(patients)}, len(patients))}
    return settings, initial_state(settings, prior, sites), sites


def mechanism(config: Config, num_patients: int) -> Mechanism:
    """The default study's, with every patient in the step."""
    privacy = config.privacy
    return Mechanism(NOISE_MULTIPLIER, 1.0, 1, privacy.max_grad_norm, privacy.target_delta).at(num_patients)


def peak_memory_mb() -> int:
    """The largest resident memory of this process so far, in megabytes (Linux)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _print(figures: dict[str, Any]) -> None:
    steps, sizes, made = (figures[key] for key in ("private_step", "bytes_per_site_and_round", "generation"))
    title = f"{figures['machine']['threads']} threads, torch {figures['machine']['torch']}"
    table = Table(title=title, title_justify="left")
    table.add_column("cost")
    for heading in ("measured", "required", "met"):
        table.add_column(heading, justify="right")
    for adapter, step in steps.items():
        seconds = step["seconds"]
        size = f"{step['patients']} patients of {step['views_per_patient']} views, {step['parameters']} parameters"
        table.add_row(f"private step, adapter {adapter}: {size}", f"{seconds['private']:.2f} s", "", "")
        table.add_row("  the same loop without noise", f"{seconds['per_patient']:.2f} s", "", "")
        table.add_row("  one batch of as many views", f"{seconds['one_batch']:.2f} s", "", "")
        for peer in ("per_patient", "one_batch"):
            ratio = step[f"ratio_to_{peer}"]
            table.add_row(f"  private / {peer.replace('_', ' ')}", f"{ratio:.3f}", *_limit(ratio, MAX_STEP_RATIO))
    for adapter, tasks in sizes.items():
        for task, size_of in tasks.items():
            total = size_of["up"] + size_of["down"]
            label = (
                f"bytes per site and round, adapter {adapter}, {task}: {size_of['down']:,} down, {size_of['up']:,} up"
            )
            table.add_row(label, f"{total:,}", *_limit(total, MAX_BYTES))
    per_pair = made["seconds_per_pair"]
    name = f"generated ED/ES pair, {made['sampler_steps']} steps of the sampler"
    table.add_row(name, f"{per_pair:.4f} s", *_limit(per_pair, MAX_PAIR_SECONDS))
    for after, num_mb in figures["peak_memory_mb"].items():
        table.add_row(f"peak memory of this process: {after}", f"{num_mb:,} MB", "", "")
    Console().print(table)


def _limit(value: float, limit: float) -> tuple[str, str]:
    """The requirement's two cells."""
    return f"<= {limit:,}", "yes" if value <= limit else "no"


if __name__ == "__main__":
    sys.exit(main())
