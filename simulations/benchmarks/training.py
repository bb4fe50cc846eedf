"""What the ResNet50's recipe gains: `python -m fedcmr.simulations.benchmarks.training [--data DIR --test DIR...]`.

The project's step (bf16 autocast where the processor has it, channels last, convolutions of few pixels as products of
matrices) is timed next to a plain float32 step in PyTorch's usual layout: same network, batch, augmentation, optimiser
and average, in turns, so that a machine that slows down slows both. With `--data` both ways train a whole network each,
on the same batches, and are evaluated on the patients of `--test`: development patients, never those that a result is
claimed on.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedcmr.server.command_line import SettingsParser
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.settings import Config, RegressionConfig, load
from fedcmr.server.tasks.ejection_fraction.examples import Examples
from fedcmr.server.tasks.ejection_fraction.training import step_loss, train_regressor, training_recipe
from fedcmr.server.training.loop import take_step
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import run_command
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Prediction, Regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.version import add_version
from fedcmr.shared.views import IMAGE_SIZE

NUM_REPEATS, NUM_UNTIMED = 10, 2
MIN_RATIO = 1.5
"""What the project requires of itself."""


class PlainRegressor(Regressor):
    """The same network as MONAI has it, in PyTorch's usual layout, in float32 throughout."""

    @staticmethod
    def arrange(network: ResNet) -> ResNet:
        """As it is."""
        return network

    def forward(self, images: Tensor) -> Prediction:
        """As its parent's, without a change of layout or precision."""
        with torch.autocast(images.device.type, enabled=False):
            ef, area_ed, area_es = self.network(images).unbind(1)
        return Prediction(torch.sigmoid(ef), F.softplus(area_ed), F.softplus(area_es))


WAYS: dict[str, type[Regressor]] = {"this project's": Regressor, "plain float32": PlainRegressor}


def main() -> int:
    """Measure and print."""
    parser = SettingsParser(prog="python -m fedcmr.simulations.benchmarks.training", description=__doc__)
    add_version(parser)
    parser.add_argument("--data", type=Path, metavar="DIR", help="train both ways on these cases, too")
    parser.add_argument("--test", type=Path, nargs="+", default=[], metavar="DIR", help="and ask them about these")
    parser.add_settings()
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    config = load("default", options.settings)
    figures: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "seconds_per_step": step_seconds(config.regression),
    }
    if options.data:
        figures["accuracy"] = accuracy(options.data, options.test, config)
    _print(figures)
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2) + "\n").encode())


def step_seconds(config: RegressionConfig, num_repeats: int = NUM_REPEATS) -> dict[str, float]:
    """Median seconds of a step each way, and how many times faster the project's is."""
    rng = torch.Generator().manual_seed(0)
    shape = (config.batch_size, 2, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.rand(shape, generator=rng) * 2 - 1
    targets = torch.rand(config.batch_size, 3, generator=rng)
    examples = Examples(images, targets[:, 0], 0.1 * targets[:, 1:], 0.5)
    states = {name: TrainingState(way().train(), config.weight_decay) for name, way in WAYS.items()}
    recipe = training_recipe(config)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(NUM_UNTIMED + num_repeats):
        for name, state in states.items():
            started = time.perf_counter()
            take_step(state, partial(step_loss, state.model, examples, config, 0), recipe)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[NUM_UNTIMED:]) for name, values in seconds.items()}
    ours, plain = (medians[name] for name in WAYS)
    return {**medians, "ratio": plain / ours}


def accuracy(data: Path, tests: list[Path], config: Config) -> dict[str, Any]:
    """Both ways' errors on the test patients after a whole training, and their difference, paired by patient."""
    cases, regression = load_cases(data), config.regression
    models = {
        name: train_regressor(cases, regression, config.seed, description=f"training, {name}", network=way)
        for name, way in WAYS.items()
    }
    figures = {}
    for folder in tests:
        patients = load_cases(folder)
        true, group = [patient_ef(case) for case in patients], ["all"] * len(patients)
        ours, plain = answers = [predict(model, patients, regression.num_tta).ef for model in models.values()]
        num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
        figures[folder.name] = {
            **{
                name: table(true, answer, group, num_bootstrap, seed)["all"]
                for name, answer in zip(models, answers, strict=True)
            },
            "difference": paired_table(true, ours, plain, group, num_bootstrap, seed)["all"],
        }
    return figures


def _print(figures: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    seconds = figures["seconds_per_step"]
    view = Table("way", "s per step", "patients: MAE, EF points", title="training the ResNet50")
    for name in WAYS:
        errors = [f"{test}: {rows[name]['mae_points']:.1f}" for test, rows in figures.get("accuracy", {}).items()]
        view.add_row(name, f"{seconds[name]:.3f}", ", ".join(errors))
    console.print(view)
    met = "met" if seconds["ratio"] >= MIN_RATIO else "missed"
    console.print(f"{seconds['ratio']:.2f} times as many pairs a second ({MIN_RATIO:g} required: {met})")
    for test, rows in figures.get("accuracy", {}).items():
        low, high = rows["difference"]["ci95"] or (float("nan"), float("nan"))
        console.print(
            f"{test}: difference {rows['difference']['difference_points']:+.1f} ({low:.1f} to {high:.1f}) points"
        )


if __name__ == "__main__":
    raise SystemExit(main())
