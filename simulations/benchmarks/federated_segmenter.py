"""What the sites' rounds bring to the public segmenter, on patients whom no site has.

`python -m fedcmr.simulations.benchmarks.federated_segmenter --site A DIR --site B DIR --test DIR... --json FILE` runs a
study's rounds for the segmenter over folders of prepared cases, one a hospital, and tests the result on each `--test`.
The plan is a study's: the share of the budget for the generator's rounds is set aside, and the epsilons are those of a
whole run. Without noise ("inf") stands next to them, and the public segmenter as it is.

A difference is taken patient by patient: a row's mean Dice minus the public segmenter's, in points (hundredths). Its
interval covers what other patients would change; each run with noise is one draw of it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedcmr.client.segmenter_training import DrawnPatient, load_drawn_patients
from fedcmr.server.command_line import SettingsParser
from fedcmr.server.federation.round import run_round
from fedcmr.server.federation.state import FederationState, StudySite, initial_state
from fedcmr.server.settings import Config, load
from fedcmr.server.tasks.segmentation.examples import can_test
from fedcmr.server.tasks.segmentation.scores import paired_dice, per_patient, score_values
from fedcmr.shared.case import Case, load_cases, read_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.progress import track
from fedcmr.shared.records import SEGMENTER
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter
from fedcmr.shared.version import add_version
from fedcmr.simulations.in_process import SitesInProcess

PUBLIC = "public segmenter"
ON = ("tasks=[ejection_fraction,segmentation]", "federation.segmenter_rounds=5")

Hospitals = Mapping[str, tuple[StudySite, Sequence[DrawnPatient]]]
"""Name -> its public facts and its patients."""
Values = dict[str, Any]
"""What `per_patient` returned."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 2 with one line on bad input."""
    return run_command(lambda: _run(_parser().parse_args(arguments)))


def load_hospital(folder: Path) -> tuple[StudySite, list[DrawnPatient]]:
    """A folder of prepared cases as a hospital, whose public number is that of its patients.

    Raises:
        UserError: The folder is none, or nobody there can teach a segmenter.
    """
    patients = load_drawn_patients(folder, load_segmenter().architecture.grid)
    if not patients:
        raise UserError(f"{folder} has no patient of whom people drew something: prepare it again or leave it out")
    vendors = {info.vendor for info in read_index(folder)}
    return StudySite(dict.fromkeys(sorted(vendors), len(patients)), len(patients)), patients


def with_target(overrides: Sequence[str], target_epsilon: float) -> Config:
    """The default settings with these, rounds for the segmenter and an epsilon; infinity switches privacy off."""
    private = target_epsilon < math.inf
    epsilon = [f"privacy.target_epsilon={target_epsilon}"] if private else ["privacy.enabled=false"]
    return load("default", [*ON, *overrides, *epsilon])


def federate(hospitals: Hospitals, config: Config, device: torch.device) -> FederationState:
    """The state after the rounds for the segmenter, which alone take place: the generator's are only planned."""
    prior = load_prior()
    facts = {name: site for name, (site, _) in hospitals.items()}
    drawn = {name: patients for name, (_, patients) in hospitals.items()}
    there = SitesInProcess(prior, {}, facts, device, drawn=drawn)
    state = initial_state(config, prior, facts)
    state = replace(state, server_round=state.generator_rounds(config))
    for _ in track(range(config.federation.segmenter_rounds), "rounds of the segmenter"):
        state, _ = run_round(state, facts, config, there.train)
    return state


def tested(segmenter: Segmenter, tests: Mapping[str, Sequence[Case]]) -> dict[str, Values]:
    """{test set: what `per_patient` says of the segmenter}."""
    return {name: per_patient(cases, predict_masks(segmenter, cases)) for name, cases in tests.items()}


def row_of(name: str, of_row: Mapping[str, Values], public: Mapping[str, Values], config: Config) -> dict[str, Any]:
    """{"name", "test": {test set: n_patients, dice, its ci95, difference to the public segmenter}}."""
    found = {}
    for test_set, values in of_row.items():
        groups = [""] * len(values["dice/mean"])
        options = (groups, config.evaluation.num_bootstrap, config.seed)
        figures = score_values(values, *options)["all"]
        difference = paired_dice(values, public[test_set], *options)["all"]
        found[test_set] = {
            "n_patients": figures["n_patients"],
            "dice": figures["dice"],
            "ci95": {"dice": figures["ci95"]["dice"]},
            "difference": difference,
        }
    return {"name": name, "test": found}


def compare(
    hospitals: Hospitals,
    tests: Mapping[str, Sequence[Case]],
    epsilons: Sequence[float],
    overrides: Sequence[str],
) -> dict[str, Any]:
    """The public segmenter, then one row for each epsilon, infinity last.

    Returns:
        `rows` of `row_of`, with `epsilon`, `noise_multiplier` and `seconds` where there were rounds; what the rounds
        were, in `settings`; and the hospitals' numbers of patients.
    """
    config = with_target(overrides, math.inf)
    device = pick_device(config.device)
    segmenter = load_segmenter().to(device)
    public = tested(segmenter, tests)
    rows = [row_of(PUBLIC, public, public, config)]
    for target in epsilons:
        settings, began = with_target(overrides, target), time.monotonic()
        state = federate(hospitals, settings, device)
        seconds = time.monotonic() - began
        with segmenter.holding({name: torch.from_numpy(array) for name, array in state.segmenter_ema.items()}):
            of_row = tested(segmenter, tests)
        name = f"tuned at the sites, epsilon {target:g}" if state.plan else "tuned at the sites, without noise"
        rows.append(
            row_of(name, of_row, public, config)
            | {
                "epsilon": target if state.plan else None,
                "noise_multiplier": state.plan[SEGMENTER].noise_multiplier if state.plan else 0.0,
                "seconds": round(seconds, 1),
            }
        )
    federation, privacy = config.federation, config.privacy
    return {
        "hospitals": {name: len(patients) for name, (_, patients) in hospitals.items()},
        "parameters": sum(parameter.numel() for parameter in segmenter.trainable().values()),
        "settings": {
            "rounds": federation.segmenter_rounds,
            "local_steps": federation.local_steps,
            "num_views": federation.num_views,
            "learning_rate": federation.segmenter_learning_rate,
            "clip": privacy.segmenter_clip,
            "share": privacy.segmenter_share,
            "delta": privacy.target_delta,
        },
        "rows": rows,
    }


def table_of(rows: Sequence[Mapping[str, Any]], test_set: str) -> Table:
    """One test set's rows for the terminal."""
    shown = Table(title=test_set, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "n", "LV", "MYO", "RV", "mean", "difference, points (95 %)"):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        figures = row["test"][test_set]
        low, high = figures["difference"]["ci95"] or (math.nan, math.nan)
        shown.add_row(
            row["name"],
            str(figures["n_patients"]),
            *("-" if value is None else f"{value:.3f}" for value in figures["dice"].values()),
            f"{figures['difference']['difference_points']:+.2f} ({low:+.2f} to {high:+.2f})",
        )
    return shown


def _run(options: argparse.Namespace) -> None:
    if min(options.epsilons, default=1) <= 0:
        raise UserError("Expected --epsilons > 0.")
    hospitals = {}
    for name, folder in options.site:
        if name in hospitals:
            raise UserError(f"Expected --site NAME DIR, each name once, got {name!r} twice.")
        hospitals[name] = load_hospital(Path(folder))
    tests = {}
    for folder in options.test:
        tests[folder.name] = [case for case in load_cases(folder) if can_test(case)]
        if not tests[folder.name]:
            raise UserError(f"{folder} holds no case that people have drawn: nothing can be tested there")
    facts = compare(hospitals, tests, options.epsilons, options.settings)
    console = Console(width=max(Console().width, 110))  # a narrower terminal wraps lines, not cells
    for test_set in tests:
        console.print(table_of(facts["rows"], test_set))
    if options.json:
        write_atomically(options.json, (json.dumps(facts, indent=2) + "\n").encode())


def _parser() -> argparse.ArgumentParser:
    parser = SettingsParser(
        prog="federated_segmenter", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--site", nargs=2, action="append", required=True, metavar=("NAME", "DIR"), help="prepared cases"
    )
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="DIR", help="folders of test patients")
    parser.add_argument(
        "--epsilons", type=float, nargs="+", default=[8, math.inf], help="of a whole run; inf: without privacy"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_settings()
    add_version(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
