"""What each part of the ResNet50's training recipe is worth: the same synthetic patients, one part left out at a time.

`python -m fedcmr.simulations.benchmarks.recipe --synthetic RUN/synthetic --test DIR... --out DIR` trains one network
per row and evaluates all of them on the test patients: development patients, never those that a result is claimed on.
Trained networks stay in `--out`, so the same command resumes where it was interrupted. Networks that differ by their
seed alone differ too: rows `seed k` say by how much.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedcmr.server.command_line import SettingsParser
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.settings import Config, RegressionConfig, load
from fedcmr.server.tasks.ejection_fraction.calibration import train_calibrated
from fedcmr.shared.case import Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, load_regressor, save_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.version import add_version

FULL = "full recipe"


@dataclass(frozen=True)
class Recipe:
    """One way to train and ask."""

    config: RegressionConfig
    seed: int = 0


def recipes(config: RegressionConfig) -> dict[str, Recipe]:
    """The rows: the whole recipe, the same with other seeds, and one part left out at a time."""
    whole = config.augmentation
    still = replace(whole, rotation_deg=0.0, log_scale=0.0, shift_px=0.0, flip=False)
    grey = replace(whole, log_gamma=0.0, contrast=0.0, brightness=0.0)
    clean = replace(whole, blur_px=0.0, noise=0.0, log_bias=0.0)
    return {
        FULL: Recipe(config),
        "seed 1": Recipe(config, seed=1),
        "seed 2": Recipe(config, seed=2),
        "no rotation, scale, shift, flip": Recipe(replace(config, augmentation=still)),
        "no gamma, contrast, brightness": Recipe(replace(config, augmentation=grey)),
        "no blur, noise, bias field": Recipe(replace(config, augmentation=clean)),
        "no average of the weights": Recipe(replace(config, ema_decay=0.0)),
        "no rotations at test time": Recipe(replace(config, num_tta=1)),
        "half the steps": Recipe(replace(config, num_steps=max(1, config.num_steps // 2))),
        "twice the steps": Recipe(replace(config, num_steps=2 * config.num_steps)),
    }


def main() -> int:
    """Train, ask, print the table, write JSON on request."""
    parser = SettingsParser(prog="python -m fedcmr.simulations.benchmarks.recipe", description=__doc__)
    add_version(parser)
    parser.add_argument("--synthetic", type=Path, required=True, metavar="DIR", help="synthetic cases of a study")
    parser.add_argument(
        "--test",
        type=Path,
        required=True,
        nargs="+",
        metavar="DIR",
        help="prepared development cases; the folder's name is the test set's",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives the networks, 94 MB each")
    parser.add_argument("--rows", metavar="A;B", help="some of the rows, besides the full recipe (default: all)")
    parser.add_settings()
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def _benchmark(options: argparse.Namespace) -> None:
    config = load("default", options.settings)
    rows = recipes(config.regression)
    chosen = list(rows) if options.rows is None else [FULL, *filter(None, options.rows.split(";"))]
    unknown = sorted(set(chosen) - set(rows))
    if unknown:
        raise UserError(f"--rows names {unknown[0]!r}: expected some of {'; '.join(rows)}")
    if len({path.name for path in options.test}) < len(options.test):
        raise UserError("--test names two folders of one name: expected names that tell the test sets apart")
    synthetic = load_cases(options.synthetic)
    tests = {path.name: load_cases(path) for path in options.test}
    options.out.mkdir(parents=True, exist_ok=True)
    predicted: dict[str, dict[str, list[float]]] = {}
    for name in chosen:
        model = trained(options.out, name, rows[name], synthetic, config)
        predicted[name] = {
            test_set: predict(model, cases, rows[name].config.num_tta, pick_device(config.device)).ef.tolist()
            for test_set, cases in tests.items()
        }
    figures = {
        test_set: compare(cases, {name: predicted[name][test_set] for name in chosen}, config)
        for test_set, cases in tests.items()
    }
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())


def trained(folder: Path, name: str, recipe: Recipe, synthetic: Sequence[Case], config: Config) -> Regressor:
    """A row's network, from `folder` where it is there; rows that train alike share one."""
    trains = replace(recipe, config=replace(recipe.config, num_tta=1))
    digest = hashlib.sha256(repr(trains).encode())
    for case in synthetic:
        digest.update(case.frames.tobytes() + str(patient_ef(case)).encode())
    path = folder / f"{digest.hexdigest()[:16]}.safetensors"
    if path.exists():
        return load_regressor(path)
    model = train_calibrated(
        synthetic,
        recipe.config,
        recipe.seed,
        pick_device(config.device),
        checkpoint=path.with_suffix(".partial"),
        description=f"training: {name}",
    )
    save_regressor(path, model, {"recipe": repr(trains)})
    return model


def compare(cases: Sequence[Case], predicted: Mapping[str, list[float]], config: Config) -> dict[str, dict[str, Any]]:
    """Scores of each row on patients with a known ejection fraction, and the paired difference to the full recipe."""
    known = [(index, patient_ef(case)) for index, case in enumerate(cases) if np.isfinite(patient_ef(case))]
    index, true = [i for i, _ in known], [ef for _, ef in known]
    one_group, bootstraps = ["all"] * len(index), config.evaluation.num_bootstrap
    full = np.array(predicted[FULL])[index]
    figures = {}
    for name, values in predicted.items():
        answers = np.array(values)[index]
        scores = table(true, answers, one_group, bootstraps, config.seed)["all"]
        against = paired_table(true, answers, full, one_group, bootstraps, config.seed)["all"]
        figures[name] = {"score": scores, "minus_full": against}
    return figures


def _print(figures: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for test_set, rows in figures.items():
        view = Table("recipe", "MAE, EF points", "minus full (95 %)", "r2", "bias", title=f"{test_set}: EF of patients")
        for name, row in rows.items():
            score, minus = row["score"], row["minus_full"]
            low, high = minus["ci95"]
            difference = "" if name == FULL else f"{minus['difference_points']:+.1f} ({low:.1f} to {high:.1f})"
            view.add_row(
                name, f"{score['mae_points']:.1f}", difference, f"{score['r2']:.2f}", f"{score['bias_points']:.1f}"
            )
        console.print(view)


if __name__ == "__main__":
    raise SystemExit(main())
