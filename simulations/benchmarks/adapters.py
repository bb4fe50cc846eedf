"""What each private adapter is worth.

    python -m fedcmr.simulations.benchmarks.adapters --cases DIR... --held-out DIR... [--set key=value ...]

Every folder of cases is one site; simulated hospitals or public development patients, for the settings that follow from
these tables cost no privacy. The rounds are those of a study without Flower: the same plan, requests, private steps and
averages, with noise really drawn. Loss is the flow-matching loss of held-out patients on fixed views, in thousandths.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedcmr.client.training import Patient, load_patients, statistics, view_seed
from fedcmr.server.command_line import SettingsParser
from fedcmr.server.federation.adapters import plan_adapter, signal_to_noise
from fedcmr.server.federation.state import FederationState, StudySite, initial_state
from fedcmr.server.federation.vendor_styles import vendor_styles
from fedcmr.server.settings import Config, load
from fedcmr.shared.adapters import ADAPTERS, Adapter
from fedcmr.shared.case import read_index
from fedcmr.shared.checkpoint import Arrays, write_atomically
from fedcmr.shared.device import autocast, pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.privacy import os_generator, private_moments
from fedcmr.shared.progress import track
from fedcmr.shared.records import GRADIENTS, STATISTICS, STYLE_MEAN, STYLE_SQUARE, Request
from fedcmr.shared.style_statistics import NUM_STEPS
from fedcmr.shared.version import add_version
from fedcmr.shared.views import augment
from fedcmr.simulations.in_process import SitesInProcess, gradient_rounds

HELD_OUT_VIEWS = 6
NUM_DRAWS = 50
"""Draws of the style statistics: they cost nothing."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Share of the budget for the style statistics; all of it is the adapter "statistics"."""


@dataclass(frozen=True)
class Site:
    """A folder of cases."""

    vendor: str
    patients: list[Patient]


def main() -> int:
    """Measure and print."""
    parser = SettingsParser(prog="python -m fedcmr.simulations.benchmarks.adapters", description=__doc__)
    add_version(parser)
    parser.add_argument(
        "--cases", type=Path, nargs="+", required=True, metavar="DIR", help="prepared cases, one site each"
    )
    parser.add_argument(
        "--held-out", type=Path, nargs="+", required=True, metavar="DIR", help="prepared cases to evaluate on"
    )
    parser.add_argument(
        "--patients", type=int, nargs="+", default=[20, 40], help="per site, the first ones (default: 20 40)"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1, 3, 8, math.inf], help="inf: without privacy")
    parser.add_argument(
        "--adapters", nargs="*", choices=ADAPTERS[1:], default=ADAPTERS[1:], help="of gradients (default: all)"
    )
    parser.add_argument("--draws", type=int, default=2, help="runs with noise drawn anew (default: %(default)s)")
    parser.add_argument("--prior", type=Path, help="public prior (default: the one that ships with the project)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_settings()
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def _benchmark(options: argparse.Namespace) -> None:
    if min(options.patients) < 2 or min(options.epsilons) <= 0 or options.draws < 1:
        raise UserError("Expected --patients >= 2, --epsilons > 0 and --draws >= 1.")
    prior = load_prior(options.prior)
    sites = [load_site(folder, prior) for folder in options.cases]
    held_out = [patient for folder in options.held_out for patient in load_patients(folder, prior)]
    sizes = sorted({min(num, *(len(site.patients) for site in sites)) for num in options.patients})
    subsets = {num: [Site(site.vendor, site.patients[:num]) for site in sites] for num in sizes}
    device = pick_device(load("default", options.settings).device)
    views = fixed_views(held_out)
    before = held_out_loss(prior.generator.to(device), views)
    tasks = [(adapter, num, target) for adapter in options.adapters for num in sizes for target in options.epsilons]
    rows = []
    for adapter, num, target in track(tasks, "fine-tuning"):
        settings = with_target(options.settings, adapter, target)
        draws = options.draws if settings.privacy.enabled else 1
        states = [federate(prior, subsets[num], settings, device) for _ in range(draws)]
        after = [adapted_loss(prior.generator, state.ema, views) for state in states]
        plan = states[0].plan
        num_parameters = sum(array.size for array in states[0].arrays.values())
        signal = signal_to_noise(plan[GRADIENTS], [num] * len(sites), num_parameters) if plan else None
        rows.append(
            {
                "adapter": adapter,
                "parameters": num_parameters,
                "patients": num,
                "epsilon": target if plan else None,
                "signal_to_noise": signal,
                "before": before,
                "change": float(np.mean(after)) - before,
                "changes": [loss - before for loss in after],
            }
        )
    targets = [target for target in options.epsilons if target < math.inf]
    style_rows = [
        {
            "patients": num,
            "epsilon": target,
            "share": share,
            **style_errors(subsets[num], options.settings, target, share),
        }
        for num in sizes
        for target in targets
        for share in SHARES
    ]
    _print(rows, style_rows)
    if options.json:
        text = json.dumps({"loss": rows, "styles": style_rows}, indent=2)
        write_atomically(options.json, (text + "\n").encode())


def load_site(folder: Path, prior: Prior) -> Site:
    """A folder of prepared cases, in the order of their names.

    Raises:
        UserError: It is no such folder, or has no usable patient.
    """
    patients = load_patients(folder, prior)
    if not patients:
        raise UserError(f"{folder} has no usable patient: prepare it again or leave it out")
    return Site(read_index(folder)[0].vendor, patients)


def with_target(overrides: Sequence[str], adapter: str, target_epsilon: float) -> Config:
    """The default settings with these, an adapter and an epsilon; infinity switches privacy off."""
    private = target_epsilon < math.inf
    epsilon = [f"privacy.target_epsilon={target_epsilon}"] if private else ["privacy.enabled=false"]
    return load("default", [*overrides, f"federation.adapter={adapter}", *epsilon])


def federate(prior: Prior, sites: Sequence[Site], config: Config, device: torch.device) -> FederationState:
    """The rounds of gradients; the statistics' share of the budget is set aside, as in a study."""
    names = [f"{number}" for number in range(len(sites))]
    facts = {
        name: StudySite({site.vendor: len(site.patients)}, len(site.patients))
        for name, site in zip(names, sites, strict=True)
    }
    patients = {name: site.patients for name, site in zip(names, sites, strict=True)}
    there = SitesInProcess(prior, patients, facts, device)
    return gradient_rounds(initial_state(config, prior, facts), facts, config, there.train)


def fixed_views(patients: Sequence[Patient]) -> list[torch.Tensor]:
    """Images, masks, style vectors, times (spread evenly for each patient) and noise, the same for every generator."""
    parts = []
    for patient in patients:
        rng = torch.Generator().manual_seed(view_seed(0, 0, 0, patient.name))
        index = torch.randint(len(patient.images), (HELD_OUT_VIEWS,), generator=rng)
        images, masks = augment(patient.images[index], patient.masks[index], rng)
        t = (torch.arange(HELD_OUT_VIEWS) + torch.rand(HELD_OUT_VIEWS, generator=rng)) / HELD_OUT_VIEWS
        noise = torch.randn(images.shape, generator=rng)
        parts.append((images, masks, patient.slice_styles[index], t, noise))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


@torch.no_grad()
def held_out_loss(generator: GenerativeModel, views: Sequence[torch.Tensor]) -> float:
    """Mean loss, in thousandths."""
    device = next(generator.parameters()).device
    losses = []
    for part in torch.arange(len(views[0])).split(64):
        with autocast(device):
            images, masks, styles, t, noise = (tensor[part].to(device) for tensor in views)
            losses.append(generator.loss_at(images, Condition(masks, styles), t, noise))
    return 1000 * float(torch.cat(losses).mean())


def adapted_loss(generator: GenerativeModel, arrays: Arrays, views: Sequence[torch.Tensor]) -> float:
    """`held_out_loss` with the trainable part of these names."""
    with generator.holding({name: torch.from_numpy(array) for name, array in arrays.items()}):
        return held_out_loss(generator, views)


def style_errors(
    sites: Sequence[Site], overrides: Sequence[str], target_epsilon: float, share: float
) -> dict[str, float]:
    """Root mean square error of the vendors' style means and stds against the sites' own.

    Returns:
        "mean" and "std" of the two-step private mean; "one_look_mean" and "one_look_std" of a single step with the
        same budget, whose std is floored alike. In units of the prior's spread. The mean is over entries, sites and
        draws.
    """
    adapter: Adapter = "statistics" if share == 1 else "norm_affine"
    shares = [f"privacy.statistics_share={share}"] if share < 1 else []
    settings = with_target([*overrides, *shares], adapter, target_epsilon)
    num_steps = (settings.federation.num_rounds - 1) * settings.federation.local_steps
    plan = plan_adapter(adapter, settings.privacy, num_steps)
    names = [f"{number}" for number in range(len(sites))]
    # One vendor per site, whatever they are called.
    vendors = {name: {name: len(site.patients)} for name, site in zip(names, sites, strict=True)}
    request = _statistics_request(settings, plan[STATISTICS].noise_multiplier)
    styles = [torch.cat([patient.styles for patient in site.patients]).double().numpy() for site in sites]
    truth = np.stack([[style.mean(axis=0), style.std(axis=0)] for style in styles])
    errors: dict[str, list[NDArray[np.float64]]] = {"": [], "one_look_": []}
    for _ in range(NUM_DRAWS):
        for prefix, squared in errors.items():
            updates: dict[str, Arrays] = {}
            for name, site, style in zip(names, sites, styles, strict=True):
                update = statistics(site.patients, request.mechanism.at(len(site.patients)), [len(style)])
                if prefix:
                    noise = request.noise_multiplier / math.sqrt(NUM_STEPS)
                    wide = private_moments(style, request.max_grad_norm, noise, len(style), os_generator())
                    mean, square = (value.astype(np.float32)[None] for value in wide)
                    update = {STYLE_MEAN: mean, STYLE_SQUARE: square}
                updates[name] = update
            # A single step is taken as it is: no noise is known that could draw the vendors together.
            found = vendor_styles(updates, vendors, request if not prefix else _statistics_request(settings, 0.0))
            squared.append((np.stack([found[name] for name in names]) - truth) ** 2)
    return {
        f"{prefix}{kind}": float(np.sqrt(np.mean([draw[:, column] for draw in squared])))
        for prefix, squared in errors.items()
        for column, kind in enumerate(("mean", "std"))
    }


def _statistics_request(config: Config, noise_multiplier: float) -> Request:
    return Request(
        task=STATISTICS,
        run_id="0" * 16,
        server_round=1,
        prior_sha256="",
        adapter="statistics",
        private=True,
        noise_multiplier=noise_multiplier,
        sample_rate=1.0,
        max_grad_norm=config.privacy.statistics_clip,
        target_delta=config.privacy.target_delta,
        local_steps=NUM_STEPS,
        learning_rate=config.federation.learning_rate,
        num_views=1,
        seed=0,
    )


def _print(rows: Sequence[dict[str, Any]], style_rows: Sequence[dict[str, Any]]) -> None:
    console = Console()
    table = Table(title="loss of held-out patients, in thousandths", title_justify="left")
    for name in (
        "adapter",
        "parameters",
        "patients a site",
        "epsilon",
        "signal to noise",
        "before",
        "change",
        "each draw",
    ):
        table.add_column(name, justify="left" if name == "adapter" else "right")
    for row in rows:
        noise = [f"{row['epsilon']:g}", f"{row['signal_to_noise']:.2f}"] if row["epsilon"] else ["none", "no noise"]
        draws = " ".join(f"{change:+.2f}" for change in row["changes"])
        sizes = (row["adapter"], str(row["parameters"]), str(row["patients"]))
        table.add_row(*sizes, *noise, f"{row['before']:.2f}", f"{row['change']:+.2f}", draws)
    console.print(table)
    table = Table(
        title="error of a vendor's style statistics, root mean square, in the prior's spread", title_justify="left"
    )
    for name in ("patients a site", "epsilon", "share", "mean", "std", "one step: mean", "one step: std"):
        table.add_column(name, justify="right")
    for row in style_rows:
        keys = ("mean", "std", "one_look_mean", "one_look_std")
        table.add_row(
            str(row["patients"]), f"{row['epsilon']:g}", f"{row['share']:g}", *(f"{row[k]:.3f}" for k in keys)
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
