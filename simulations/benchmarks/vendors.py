"""Whether synthetic images carry their vendor's style: a vendor classifier that has seen the sites' scans only.

A small network is trained on the middle slices of the sites' training patients and predicts the vendor of held-out
patients and of the run's synthetic ones. A second one sees the heart alone, the rest of the image is blank: what
surrounds a synthetic heart is the public prior's thorax, in which no vendor's scanner is to be expected. Next to them a
logistic regression on the style vectors. All read the sites' cases: this is for a simulation, or for who may see
them.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedcmr.client.policy import load_site
from fedcmr.server.experiments.models import test_sets
from fedcmr.server.run_folder import load_run
from fedcmr.server.settings import AugmentationConfig
from fedcmr.server.tasks.ejection_fraction.training import batch_indices
from fedcmr.server.training.augmentation import augment_pairs
from fedcmr.server.training.loop import Budget, Recipe, train
from fedcmr.server.training.schedule import ema_decay, one_cycle
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import Case, is_heart, load_cases
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.style import style_vector
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices
from fedcmr.shared.version import add_version
from fedcmr.shared.views import slice_pairs, with_heart

CHANNELS = (16, 32, 64)
NUM_STEPS, BATCH_SIZE, PEAK_RATE, WEIGHT_DECAY, EMA_DECAY, MAX_GRAD_NORM = 400, 32, 3e-3, 0.05, 0.98, 1.0
GEOMETRY = AugmentationConfig(log_gamma=0, contrast=0, brightness=0, blur_px=0, noise=0, log_bias=0)
"""Grey values, sharpness and noise are what distinguishes vendors: only position, size and direction are varied."""
Z = 1.959964
"""Normal quantile of a 95 % interval."""


def main() -> int:
    """Train, ask, print the tables, write JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.vendors", description=__doc__)
    add_version(parser)
    parser.add_argument("run", type=Path, metavar="RUN", help="finished study with sites of several vendors")
    parser.add_argument("--synthetic", type=Path, metavar="DIR", help="synthetic cases (default: RUN/synthetic)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


class VendorNetwork(nn.Module):
    """A small convolutional network: which vendor's scanner made an ED/ES pair."""

    def __init__(self, num_vendors: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in zip((2, *CHANNELS), CHANNELS, strict=False):
            layers += [
                nn.Conv2d(inside, outside, 3, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
                nn.Conv2d(outside, outside, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS[-1], num_vendors)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, V) of pairs (N, 2, 64, 64) in [-1, 1]."""
        return self.head(self.features(images).mean(dim=(2, 3)))


def train_network(
    cases: Sequence[Case], vendors: Sequence[str], num_steps: int, seed: int, heart_only: bool = False
) -> VendorNetwork:
    """Train on the middle slices of every case; a vendor with fewer slices weighs as much as any other."""
    stacks = [_middle(case, heart_only) for case in cases]
    images = torch.cat(stacks)
    labels = torch.cat(
        [torch.full((len(stack),), vendors.index(case.info.vendor)) for stack, case in zip(stacks, cases, strict=True)]
    )
    weights = len(labels) / (len(vendors) * torch.bincount(labels, minlength=len(vendors)).clamp(min=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = TrainingState(VendorNetwork(len(vendors)).train(), WEIGHT_DECAY)

    def loss_of_step(step: int) -> Tensor:
        index = batch_indices(len(images), BATCH_SIZE, seed, step)
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        logits = state.model(augment_pairs(images[index], GEOMETRY, rng)[0])
        return F.cross_entropy(logits, labels[index], weight=weights)

    recipe = Recipe(
        lambda step, _: one_cycle(step, num_steps, PEAK_RATE),
        lambda step, _: ema_decay(EMA_DECAY, step),
        MAX_GRAD_NORM,
    )
    train(state, loss_of_step, recipe, Budget(num_steps), "training the vendor classifier")
    return state.ema.eval()


@torch.inference_mode()
def recognise(network: VendorNetwork, cases: Sequence[Case], heart_only: bool = False) -> NDArray[np.int64]:
    """Each patient's vendor, shape (len(cases),): the largest mean probability over the middle slices."""
    answers = [network(_middle(case, heart_only)).softmax(1).mean(0).argmax().item() for case in cases]
    return np.array(answers, dtype=np.int64)


def codes_of(cases: Sequence[Case], prior: Prior) -> NDArray[np.float32]:
    """Standardised style vectors, shape (len(cases), K), as the sites measure them."""
    styles = []
    for case in cases:
        images, masks = slice_pairs(case, prior.grid)
        keep = with_heart(masks)
        styles.append(prior.standardise(style_vector(images[keep], masks[keep], prior.grid.pixel_mm)))
    return torch.stack(styles).numpy()


def recognition(answers: NDArray[np.int64], cases: Sequence[Case], vendors: Sequence[str]) -> dict[str, Any]:
    """Accuracy over patients with its 95 % interval, and the confusion table.

    Returns:
        `n_patients`, `accuracy`, `ci95` (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953), and `confusion`:
        {true vendor: {answer: patients}}.
    """
    true = np.array([vendors.index(case.info.vendor) for case in cases])
    confusion = {
        name: {other: int(((true == i) & (answers == j)).sum()) for j, other in enumerate(vendors)}
        for i, name in enumerate(vendors)
    }
    right, num = int((true == answers).sum()), len(true)
    share, denominator = right / num, 1 + Z**2 / num
    middle = (share + Z**2 / (2 * num)) / denominator
    half = Z * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2)) / denominator
    return {"n_patients": num, "accuracy": share, "ci95": [middle - half, middle + half], "confusion": confusion}


def _benchmark(options: argparse.Namespace) -> None:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("scikit-learn is missing: install it with 'pip install -e .[dev]'") from None
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"{options.json.parent} is no folder: give a path for --json in a folder that is there")
    run = load_run(options.run)
    training = [
        case for name in run.site_names() for case in load_cases(load_site(run.path / "sites" / name).data_path)
    ]
    vendors = sorted({case.info.vendor for case in training})
    if len(vendors) < 2:
        raise UserError(
            f"{run.path} has sites of {' '.join(vendors) or 'no vendor'} only: expected two vendors or more"
        )
    sets = {
        "training scans": training,
        "held-out scans": [case for _, cases in test_sets(run) for case in cases],
        "synthetic": load_cases(options.synthetic or run.path / "synthetic"),
    }
    sets = {name: [case for case in cases if case.info.vendor in vendors] for name, cases in sets.items()}
    empty = [name for name, cases in sets.items() if not cases]
    if empty:
        raise UserError(f"{run.path} has no {empty[0]} of {', '.join(vendors)}: finish the study first")

    prior = load_prior(run.prior_path())
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for name, heart_only in (("network on images", False), ("network on the heart alone", True)):
        network = train_network(training, vendors, options.steps, options.seed, heart_only)
        figures[name] = {
            of: recognition(recognise(network, cases, heart_only), cases, vendors) for of, cases in sets.items()
        }
    labels = [vendors.index(case.info.vendor) for case in training]
    regression = LogisticRegression(class_weight="balanced", max_iter=1000).fit(codes_of(training, prior), labels)
    figures["logistic regression on style vectors"] = {
        of: recognition(regression.predict(codes_of(cases, prior)), cases, vendors) for of, cases in sets.items()
    }
    console = Console(width=None if sys.stdout.isatty() else 120)
    for model, answers in figures.items():
        console.print(_table(model, answers, vendors))
    if options.json:
        options.json.write_text(json.dumps({"vendors": vendors, **figures}, indent=2) + "\n", encoding="utf-8")


def _middle(case: Case, heart_only: bool) -> Tensor:
    """The middle slices, which the regressor sees as well; shape (Z', 2, 64, 64). All but the heart is 0 on request."""
    images, masks = slice_pairs(case)
    return (images * is_heart(masks) if heart_only else images)[middle_slices(len(images))]


def _table(model: str, answers: dict[str, dict[str, Any]], vendors: Sequence[str]) -> Table:
    """Accuracy and, per true vendor, how many patients were taken for which."""
    table = Table(title=f"vendor recognised by {model}", title_justify="left")
    for heading in ("patients", "accuracy (95 %)", "true vendor"):
        table.add_column(heading)
    for vendor in vendors:
        table.add_column(f"taken for {vendor}", justify="right")
    for name, values in answers.items():
        low, high = values["ci95"]
        figures = f"{values['accuracy']:.2f} ({low:.2f} to {high:.2f}), n = {values['n_patients']}"
        for vendor in vendors:
            first = vendor == vendors[0]
            row = [str(values["confusion"][vendor][other]) for other in vendors]
            table.add_row(name if first else "", figures if first else "", vendor, *row)
        table.add_section()
    return table


if __name__ == "__main__":
    sys.exit(main())
