"""Which saliency map shows where an ejection fraction comes from: layers and methods against covering places.

Squares of the image are replaced, one after the other, by the image's mean grey; how far the logit of the ejection
fraction moves is what rests on that place, without any gradient. Each map is compared with it by rank, image by
image, on the middle slice of every patient. Networks that nobody has trained show what the brightness of hearts
alone brings.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.visualize import GradCAM
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

from fedcmr.server.tasks.ejection_fraction.saliency import (
    EF_COLUMN,
    HiResCAM,
    centred_slices,
    saliency_maps,
    saliency_share,
)
from fedcmr.shared.case import load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.progress import track
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, load_regressor
from fedcmr.shared.version import add_version

SQUARE_PX, STEP_PX = 10, 6
NUM_WARM_UPS = 20
LAYERS = ("layer1", "layer2", "layer3", "layer4")
UNTRAINED_SEEDS = (0, 1, 2)

Figures = dict[str, dict[str, Any]]


class PositiveHiResCAM(HiResCAM):
    """What raises the prediction alone."""

    def rectify(self, maps: Tensor) -> Tensor:
        """As Grad-CAM does."""
        return F.relu(maps)


METHODS: dict[str, type[GradCAM]] = {
    "Grad-CAM": GradCAM,
    "HiResCAM, positive": PositiveHiResCAM,
    "HiResCAM, both signs": HiResCAM,
}


def main() -> int:
    """Cover, map, print the table, write JSON on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.saliency", description=__doc__)
    add_version(parser)
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="a run's regressor.safetensors")
    parser.add_argument("--cases", type=Path, required=True, metavar="DIR", help="cases with masks")
    parser.add_argument("--num", type=int, default=24, metavar="N", help="patients at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def _benchmark(options: argparse.Namespace) -> None:
    model = load_regressor(options.model)
    cases = [case for case in load_cases(options.cases) if case.info.contours not in ("", "partial", "auto")][
        : options.num
    ]
    if not cases:
        raise UserError(f"{options.cases} holds no case with masks: expected some")
    stacks, labels = centred_slices(cases)
    images = torch.stack([stack[len(stack) // 2] for stack in stacks])
    masks = torch.stack([stack[len(stack) // 2] for stack in labels])
    figures = compare(model, images, masks)
    _print(figures, len(cases))
    if options.json:
        write_atomically(options.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())


def compare(model: Regressor, images: Tensor, masks: Tensor) -> Figures:
    """Figures of every layer and method, of covering itself, and of untrained networks.

    Args:
        model: The network to explain.
        images: Shape (N, 2, 64, 64) in [-1, 1].
        masks: Shape (N, 2, 64, 64), uint8 labels 0..3.

    Returns:
        {name: share_in_heart, area_share, and rank_correlation with covering where it was compared}.
    """
    moved = covering(model, images)
    spread = F.interpolate(moved[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    figures: Figures = {"covering": _shares(spread, masks)}
    for layer in LAYERS:
        for name, method in METHODS.items():
            maps = saliency_maps(model, images, layer=layer, method=method)
            figures[f"{layer}, {name}"] = {**_shares(maps, masks), "rank_correlation": _agreement(maps, moved)}
    for seed in UNTRAINED_SEEDS:
        maps = saliency_maps(untrained(images, seed), images)
        figures[f"untrained network {seed}"] = _shares(maps, masks)
    return figures


@torch.inference_mode()
def covering(model: Regressor, images: Tensor) -> Tensor:
    """How far the prediction's logit moves when a square turns grey; shape (N, P, P) of squares `STEP_PX` apart."""
    model.eval()
    before = model.network(images)[:, EF_COLUMN]
    grey = images.mean(dim=(2, 3), keepdim=True)
    places = range(0, images.shape[-1] - SQUARE_PX + 1, STEP_PX)
    rows = []
    for top in track(places, "covering places"):
        for left in places:
            covered = images.clone()
            covered[..., top : top + SQUARE_PX, left : left + SQUARE_PX] = grey
            rows.append((model.network(covered)[:, EF_COLUMN] - before).abs())
    return torch.stack(rows, 1).reshape(len(images), len(places), len(places))


def untrained(images: Tensor, seed: int) -> Regressor:
    """Random weights, all branches open, with batch statistics of the images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Regressor().train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        for _ in range(NUM_WARM_UPS):
            model.network(images)
    return model.eval()


def _shares(maps: Tensor, masks: Tensor) -> dict[str, Any]:
    """Mean shares over the images whose slice holds a heart and whose map is not zero; None without any."""
    shares = np.array([saliency_share(m[None], heart[None]) for m, heart in zip(maps, masks, strict=True)])
    known = shares[np.isfinite(shares).all(axis=1)]
    in_heart, area = known.mean(axis=0).tolist() if len(known) else (None, None)
    return {"share_in_heart": in_heart, "area_share": area}


def _agreement(maps: Tensor, moved: Tensor) -> float | None:
    """Spearman's rank correlation of map and covering over an image's squares, mean over the images with a map."""
    squares = F.avg_pool2d(maps[:, None], SQUARE_PX, STEP_PX)[:, 0]
    pairs = [(one, other) for one, other in zip(squares.flatten(1), moved.flatten(1), strict=True) if one.any()]
    return float(np.mean([spearmanr(one, other).statistic for one, other in pairs])) if pairs else None


def _print(figures: Figures, num: int) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    view = Table("map", "rank correlation with covering", "share in the heart", "area", title=f"{num} patients")
    for name, row in figures.items():
        agreement = _figure(row["rank_correlation"]) if "rank_correlation" in row else ""
        view.add_row(name, agreement, _figure(row["share_in_heart"]), _figure(row["area_share"]))
    console.print(view)


def _figure(value: float | None) -> str:
    return "no map" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
