"""What kind of generative model learns most in the same minutes: flow matching, diffusion, or a latent flow.

`python -m fedcmr.simulations.benchmarks.model_comparison --minutes 15 --out DIR` trains a model of every kind on the
same simulated hearts, each for so many minutes, as `fedcmr-server pretrain` does, and has all of them generate the same
other hearts: from pure noise, and from a half-noised guide with the intensities of the style, as the project does.
Nothing is matched to the style afterwards (`fedcmr.server.generation.intensity_matching`), so that the figures are the
models' own. Trained models stay in `--out`, each a prior: the same command resumes where it was interrupted.

A rendered heart is what a model should generate. The distance to rendered ones is the Frechet distance (Heusel et al.
2017, https://arxiv.org/abs/1706.08500) of the public segmenter's deepest features, averaged over positions; the row
"rendered hearts" shows what two sets of rendered hearts have.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedcmr.server.generation.heart_shapes import masks_from
from fedcmr.server.generation.intensity_matching import match_intensities
from fedcmr.server.generation.pretraining import train_prior
from fedcmr.server.generation.public_hearts import PublicHearts, simulate_hearts
from fedcmr.server.generation.rendering import render
from fedcmr.server.settings import Config, GeneratorConfig, PretrainConfig
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import autocast
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.base import Condition, GenerativeModel, Sampler
from fedcmr.shared.models.kinds import KINDS
from fedcmr.shared.models.prior import load_prior, save_prior
from fedcmr.shared.style import style_vectors
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.generator import check_outputs, ef_agreement, spread_hearts, stacks

NUM_SLICES = 8
SAMPLERS = (Sampler(16, 0.02), Sampler(4, 0.5))
"""Predicted noise says nothing of an image at 0, hence 0.02: next to pure noise, for every kind."""
UNTIL_TIME_IS_UP = 10**9
HELD_OUT, OTHERS = 1_000_003, 2_000_003
"""Added to the seed: hearts that are generated, and those that they are compared with."""
BATCH_SIZE = 64
SHOWN = 6


@dataclass(frozen=True)
class Row:
    """Figures of one kind under one sampler; None where a figure has no meaning.

    Attributes:
        kind: One of `KINDS`, or what is compared with them.
        t_start: Where the sampler starts: 0 noise, 1 the guide.
        num_steps: Calls of the network per image.
        r: Pearson's r of the ejection fraction requested and found by the segmenter.
        r_ci95: Its 95 % interval over hearts.
        mae_points: Mean absolute difference of the two, EF points.
        not_found: Hearts in which the segmenter found no ventricle; they are left out of both.
        style_error: Mean absolute difference of the style vectors requested and measured, in standard deviations.
        distance: Frechet distance to other rendered hearts.
        ms_per_pair: Milliseconds of generating, per ED/ES pair.
        train_steps: Steps that the minutes were enough for.
        parameters: Number of parameters of the U-Net, without the autoencoder of a latent space.
    """

    kind: str
    t_start: float | None
    num_steps: int | None
    r: float | None
    r_ci95: list[float] | None
    mae_points: float | None
    not_found: int
    style_error: float
    distance: float
    ms_per_pair: float | None = None
    train_steps: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Requested:
    """Rendered hearts: what is to be generated, and an image of it.

    Attributes:
        efs: Shape (N,), requested.
        masks: Shape (N, S, 2, 64, 64), uint8 labels.
        images: Shape (N, S, 2, 64, 64), float32 in [-1, 1].
        guides: The same hearts rendered again, with the intensities of their styles, of the same shape.
        styles: Shape (N, K), standardised style vectors of `images`.
    """

    efs: Tensor
    masks: Tensor
    images: Tensor
    guides: Tensor
    styles: Tensor


def main() -> int:
    """Train, generate, print the table, write JSON and images on request."""
    what, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.model_comparison",
        description=what,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--minutes", type=float, default=15, help="of training, for every kind (default: %(default)s)")
    parser.add_argument("--kinds", metavar="A,B", help=f"some of: {', '.join(KINDS)} (default: all)")
    parser.add_argument(
        "--num-hearts", type=int, default=2000, metavar="N", help="to learn from (default: %(default)s)"
    )
    parser.add_argument("--num-cases", type=int, default=48, metavar="N", help="to generate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of hearts, weights and noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives the models, 8 MB each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="also show generated hearts there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def held_out_hearts(num_cases: int, train_set: PublicHearts, seed: int) -> Requested:
    """Hearts over the whole range of ejection fractions, with style vectors on the scale of the training set's."""
    rng = torch.Generator().manual_seed(seed)
    efs, hearts, d = spread_hearts(num_cases, NUM_SLICES, rng)
    masks, images = masks_from(d), render(hearts, d, rng)
    styles = _styles(images, masks, train_set)
    guides = match_intensities(render(hearts, d, rng), masks, styles * train_set.style_std + train_set.style_mean)
    return Requested(efs, masks, images, guides, styles)


def trained(folder: Path, kind: str, hearts: PublicHearts, minutes: float, seed: int) -> tuple[GenerativeModel, int]:
    """A kind's model and the number of its steps, from `folder` where it is there."""
    path = folder / f"{kind}.safetensors"
    settings = {"minutes": minutes, "seed": seed, "num_images": len(hearts.images)}
    if not path.exists():
        pretrain = PretrainConfig(num_steps=UNTIL_TIME_IS_UP)
        config = Config(seed=seed, device="cpu", generator=GeneratorConfig(kind), pretrain=pretrain)
        interrupted = path.with_suffix(".checkpoint")
        result = train_prior(config, hearts, interrupted, minutes)
        scale = (hearts.style_mean, hearts.style_std, hearts.style_correlation)
        made_by = {"settings": json.dumps(settings), "num_steps": str(result.num_steps)}
        save_prior(path, result.model, *scale, made_by)
        for file in folder.glob(f"{interrupted.name}*"):
            file.unlink()
    prior = load_prior(path)
    found = json.loads(prior.made_by.get("settings", "null"))
    if found != settings:
        raise UserError(f"{path} was trained with {found}: remove it or give another --out")
    return prior.generator, int(prior.made_by["num_steps"])


def generate(model: GenerativeModel, hearts: Requested, sampler: Sampler, seed: int) -> Tensor:
    """Images of all slices of all hearts, of the shape of `hearts.images`."""
    rng = torch.Generator().manual_seed(seed)
    condition = Condition(hearts.masks.flatten(0, 1), hearts.styles.repeat_interleave(NUM_SLICES, dim=0))
    guides = hearts.guides.flatten(0, 1)
    with autocast(guides.device):
        parts = [
            model.sample(condition[part], sampler, rng, guides[part])
            for part in torch.arange(len(guides)).split(BATCH_SIZE)
        ]
    return torch.cat(parts).reshape(hearts.images.shape)


@torch.inference_mode()
def features(segmenter: Segmenter, images: Tensor) -> NDArray[np.float64]:
    """The segmenter's deepest features averaged over positions, shape (pairs, 128), of images (N, S, 2, 64, 64)."""
    network: Any = segmenter.network

    def deepest(part: Tensor) -> Tensor:
        x = network.conv_0(part)
        for level in (network.down_1, network.down_2, network.down_3, network.down_4):
            x = level(x)
        return x.float().mean(dim=(2, 3))

    return torch.cat([deepest(part) for part in images.flatten(0, 1).split(BATCH_SIZE)]).double().numpy()


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Between normal distributions with the means and covariances of two sets of features (Heusel et al. 2017)."""
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    # The trace of a matrix's square root is the sum of the roots of its eigenvalues; of this product all are >= 0.
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None))
    means = float(((first.mean(0) - second.mean(0)) ** 2).sum())
    return means + float(np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def _benchmark(options: argparse.Namespace) -> None:
    names = list(KINDS) if options.kinds is None else [name for name in options.kinds.split(",") if name]
    if unknown := sorted(set(names) - set(KINDS)):
        raise UserError(f"--kinds names {unknown[0]!r}: expected some of {', '.join(KINDS)}")
    for name, least in (("minutes", 0.01), ("num_hearts", 8), ("num_cases", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    check_outputs(options)
    options.out.mkdir(parents=True, exist_ok=True)
    segmenter = load_segmenter()
    learnt = simulate_hearts(options.num_hearts, options.seed)
    requested = held_out_hearts(options.num_cases, learnt, options.seed + HELD_OUT)
    others = features(segmenter, held_out_hearts(options.num_cases, learnt, options.seed + OTHERS).images)

    def evaluate(kind: str, images: Tensor, sampler: Sampler | None = None) -> Row:
        cases = stacks(images, requested.masks)
        error = float((_styles(images, requested.masks, learnt) - requested.styles).abs().mean())
        distance = frechet_distance(features(segmenter, images), others)
        agreement = ef_agreement(segmenter, requested.efs.tolist(), cases)
        t_start, num_steps = (sampler.t_start, sampler.num_steps) if sampler else (None, None)
        return Row(kind, t_start, num_steps, **agreement, style_error=error, distance=distance)

    rows = [evaluate("rendered hearts", requested.images), evaluate("guides", requested.guides)]
    shown = {"rendered hearts": requested.images, "guides": requested.guides}
    for name in names:
        model, train_steps = trained(options.out, name, learnt, options.minutes, options.seed)
        parameters = sum(parameter.numel() for parameter in model.unet.parameters())
        for sampler in SAMPLERS:
            started = time.perf_counter()
            images = generate(model, requested, sampler, options.seed)
            ms = 1000 * (time.perf_counter() - started) / (options.num_cases * NUM_SLICES)
            row = evaluate(name, images, sampler)
            rows.append(replace(row, ms_per_pair=ms, train_steps=train_steps, parameters=parameters))
            shown[f"{name}, from {sampler.t_start:g}"] = images
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(_table(rows, options))
    if options.json:
        figures = {
            "minutes": options.minutes,
            "seed": options.seed,
            "threads": torch.get_num_threads(),
            "rows": [asdict(row) for row in rows],
        }
        write_atomically(options.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())
    if options.plot:
        draw(options.plot, shown)


def _styles(images: Tensor, masks: Tensor, scale: PublicHearts) -> Tensor:
    """Style vectors (N, K) standardised as the training set's; a region that a heart does not have gets the mean."""
    return torch.nan_to_num((style_vectors(images, masks) - scale.style_mean) / scale.style_std, nan=0.0)


def _table(rows: Sequence[Row], options: argparse.Namespace) -> Table:
    table = Table(
        title=f"{options.minutes:g} minutes of training each, {options.num_cases} hearts generated",
        title_justify="left",
    )
    table.add_column("kind", no_wrap=True)
    for heading in (
        "start",
        "steps",
        "EF: r (95 %)",
        "MAE, points",
        "not found",
        "style: error, sd",
        "distance",
        "ms per pair",
        "trained steps",
    ):
        table.add_column(heading, justify="right", no_wrap=heading.startswith("EF"))

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for row in rows:
        interval = f" ({row.r_ci95[0]:.3f} to {row.r_ci95[1]:.3f})" if row.r_ci95 else ""
        table.add_row(
            row.kind,
            "-" if row.t_start is None else f"{row.t_start:g}",
            show(row.num_steps, 0),
            show(row.r, 3) + interval,
            show(row.mae_points, 1),
            str(row.not_found),
            show(row.style_error, 2),
            show(row.distance, 2),
            show(row.ms_per_pair, 1),
            show(row.train_steps, 0),
        )
    return table


def draw(path: Path, shown: dict[str, Tensor]) -> None:
    """The same hearts' middle slices at end-diastole by every kind, a line each, as a PNG."""
    figure = Figure(figsize=(1.4 * SHOWN + 3, 1.4 * len(shown)), layout="constrained")
    for line, (name, images) in enumerate(shown.items()):
        chosen = np.linspace(0, len(images) - 1, SHOWN).round().astype(int)
        for place, index in enumerate(chosen):
            axis = figure.add_subplot(len(shown), SHOWN, line * SHOWN + place + 1)
            axis.imshow(images[index, NUM_SLICES // 2, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            if place == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
