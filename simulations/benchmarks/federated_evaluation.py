"""What privacy costs an evaluation at the sites: `python -m fedcmr.simulations.benchmarks.federated_evaluation [RUN]`.

For numbers of test patients behind a figure and epsilons of each: what the noise alone adds to the mean absolute error
and the bias, next to what other patients would change (the sampling error, which the plain table has too), both as
standard deviations in EF points; how often the report would show the figure, and how often its 95 % interval then holds
the truth. Patients are drawn, with replacement, from the predictions of the main model in a run folder; without one
from normal distributions: ejection fraction 0.50 +- 0.15, error -2 +- 7.3 points, which misses by 6 on average.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedcmr.server.evaluation.from_sums import figures, formulas
from fedcmr.server.experiments.models import read_predictions
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.federation.noise_plan import least_noise
from fedcmr.server.run_folder import load_run
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.tasks.ejection_fraction.sums import PatientError, from_private, plain_terms, private_table
from fedcmr.shared.version import add_version

NUM_PATIENTS = (15, 20, 45, 90)
EPSILONS = (1.0, 3.0, 8.0)
DELTA = 1e-3
MEASURED = ("mae_points", "bias_points")
POOL = 100_000
"""Patients of the stated distribution."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.federated_evaluation", description=__doc__
    )
    add_version(parser)
    parser.add_argument("run", type=Path, nargs="?", help="run folder with answers on test patients")
    parser.add_argument("--draws", type=int, default=2000, help="for each row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of patients and noise, which here protects nobody")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)
    true, predicted = stated_patients(rng) if options.run is None else answers_of(options.run)
    rows = [
        private_cost(true, predicted, num, epsilon, options.draws, rng) for num in NUM_PATIENTS for epsilon in EPSILONS
    ]
    mae = 100 * float(np.abs(predicted - true).mean())
    found = {"patients": str(options.run or "stated distribution"), "mae_points": mae, "delta": DELTA, "rows": rows}
    if options.json:
        write_atomically(options.json, (json.dumps(found, indent=2) + "\n").encode(), private=False)
    table = Table(title=f"what noise adds, EF points (MAE {mae:.1f}, delta {DELTA:g})", title_justify="left")
    for heading in (
        "patients",
        "epsilon",
        "noise",
        "MAE: noise",
        "sampling",
        "shown",
        "interval holds",
        "bias: noise",
        "sampling",
        "shown",
        "interval holds",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [text for name in MEASURED for text in _cells(row[name])]
        table.add_row(str(row["num_patients"]), f"{row['epsilon']:g}", f"{row['noise_multiplier']:.2f}", *cells)
    Console(width=130).print(table)


def _cells(measured: dict[str, Any]) -> list[str]:
    holds = measured["interval_holds"]
    return [
        f"{measured['noise_sd']:.2f}",
        f"{measured['sampling_sd']:.2f}",
        f"{measured['shown']:.0%}",
        "-" if holds is None else f"{holds:.0%}",
    ]


def stated_patients(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """True and predicted ejection fractions of the module's distribution, shape (POOL,) each."""
    true = rng.normal(0.5, 0.15, POOL).clip(0.1, 0.85)
    return true, (true + rng.normal(-0.02, 0.073, POOL)).clip(0, 1)


def answers_of(run: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The main model's predictions on all test sets of a run.

    Raises:
        UserError: There are none.
    """
    sets = read_predictions(load_run(run)).get(MAIN_MODEL, {})
    if not sets:
        raise UserError(f"{run} holds no answers of the main model on test patients: give a finished run folder")
    true, predicted = ([value for answers in sets.values() for value in answers[key]] for key in ("true", "predicted"))
    return np.array(true), np.array(predicted)


def private_cost(
    true: NDArray[np.float64],
    predicted: NDArray[np.float64],
    num_patients: int,
    epsilon: float,
    num_draws: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """One row: what noise and sampling do to each figure of `MEASURED`.

    Args:
        true: Shape (M,), the patients to draw from.
        predicted: Shape (M,).
        num_patients: Drawn for a figure, all at one site.
        epsilon: Epsilon of each of them.
        num_draws: Draws of patients and noise.
        rng: Source of both.
    """
    noise_multiplier = least_noise(epsilon, DELTA)
    truth = {
        "mae_points": 100 * float(np.abs(predicted - true).mean()),
        "bias_points": 100 * float((predicted - true).mean()),
    }
    plain: dict[str, list[float]] = {name: [] for name in MEASURED}
    noise: dict[str, list[float]] = {name: [] for name in MEASURED}
    inside: dict[str, list[bool]] = {name: [] for name in MEASURED}
    for _ in range(num_draws):
        drawn = rng.integers(len(true), size=num_patients)
        patients = [PatientError("GE", t, p) for t, p in zip(true[drawn], predicted[drawn], strict=True)]
        exact = np.sum([plain_terms(patient) for patient in patients], axis=0)
        sums, covariance = from_private(private_table(patients, ["GE"], noise_multiplier, rng), noise_multiplier)
        shown = figures(sums["GE"], covariance)
        by_formula = formulas(exact, covariance)
        for name in MEASURED:
            formula = by_formula[name]
            assert formula is not None, "a mean of at least one patient"
            value, gradient, _ = formula
            plain[name].append(100 * value)
            noise[name].append(100 * float(np.sqrt(gradient @ covariance @ gradient)))
            if shown[name] is not None:
                low, high = shown["ci95"][name]
                inside[name].append(bool(low <= truth[name] <= high))
    return {
        "num_patients": num_patients,
        "epsilon": epsilon,
        "noise_multiplier": noise_multiplier,
        **{
            name: {
                "noise_sd": float(np.mean(noise[name])),
                "sampling_sd": float(np.std(plain[name])),
                "shown": len(inside[name]) / num_draws,
                "interval_holds": float(np.mean(inside[name])) if inside[name] else None,
            }
            for name in MEASURED
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
