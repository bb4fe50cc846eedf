"""What kind of generator learns most in the same minutes: flow matching or diffusion; pixels, blocks or a latent space.

`python -m fedcmr.simulations.benchmarks.model_comparison --minutes 15 --out DIR` trains a network of every kind on the
same simulated hearts, each for so many minutes, and has all of them paint the same other hearts: from pure noise, and
from a half-noised sketch in the colours of the code, as the project does. Nothing is brought to the code afterwards
(`fedcmr.server.generation.intensity_matching`), so that the figures are the networks' own. Trained networks stay in
`--out`: the same command goes on where it was interrupted.

A rendered heart is what a network should paint. The distance to rendered ones is the Frechet distance (Heusel et al.
2017, https://arxiv.org/abs/1706.08500) of the public segmenter's deepest features, averaged over positions; the row
"rendered hearts" tells what two sets of rendered hearts have.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedcmr.server.generation.heart_shapes import masks_from
from fedcmr.server.generation.intensity_matching import recolour
from fedcmr.server.generation.pretraining import PublicHearts, simulate_hearts
from fedcmr.server.generation.rendering import render
from fedcmr.shared import checkpoint
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.style import style_vectors
from fedcmr.shared.tasks.segmentation.network import Segmenter, load_segmenter
from fedcmr.shared.version import add_version
from fedcmr.simulations.benchmarks.generative_models import KINDS, Painter, train
from fedcmr.simulations.benchmarks.generator import check_outputs, ef_agreement, spread_hearts, stacks

NUM_SLICES = 8
SAMPLERS = ((0.02, 16), (0.5, 4))
"""(start, steps). Predicted noise tells nothing of a picture at 0, hence 0.02: next to pure noise, for every kind."""
HELD_OUT, OTHERS = 1_000_003, 2_000_003
"""Added to the seed: hearts that are painted, and those that they are compared with."""
BATCH_SIZE = 64
SHOWN = 6


@dataclass(frozen=True)
class Row:
    """Figures of one kind under one sampler; None where a figure has no meaning.

    Attributes:
        kind: One of `KINDS`, or what is compared with them.
        start_t: Where the sampler starts: 0 noise, 1 the sketch.
        num_steps: Calls of the network per picture.
        r: Pearson's r of the ejection fraction asked for and found by the segmenter.
        r_ci95: Its 95 % interval over hearts.
        mae_points: Mean absolute difference of the two, EF points.
        not_found: Hearts in which the segmenter found no ventricle; they are left out of both.
        code_error: Mean absolute difference of the codes asked for and measured, in standard deviations.
        distance: Frechet distance to other rendered hearts.
        ms_per_pair: Milliseconds of painting, per ED/ES pair.
        train_steps: That the minutes were enough for.
        parameters: Of the network, without the autoencoder of a latent space.
    """

    kind: str
    start_t: float | None
    num_steps: int | None
    r: float | None
    r_ci95: list[float] | None
    mae_points: float | None
    not_found: int
    code_error: float
    distance: float
    ms_per_pair: float | None = None
    train_steps: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Asked:
    """Rendered hearts: what is to be painted, and a picture of it.

    Attributes:
        efs: Shape (N,), asked for.
        masks: Shape (N, S, 2, 64, 64), uint8 labels.
        pictures: Shape (N, S, 2, 64, 64), float32 in [-1, 1].
        sketches: The same hearts rendered again, in the colours of their codes, of the same shape.
        codes: Shape (N, K), standardised codes of `pictures`.
    """

    efs: Tensor
    masks: Tensor
    pictures: Tensor
    sketches: Tensor
    codes: Tensor


def main() -> int:
    """Train, paint, print the table, write JSON and pictures on request."""
    what, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.model_comparison",
        description=what,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("--minutes", type=float, default=15, help="of training, for every kind (default: %(default)s)")
    parser.add_argument("--kinds", metavar="A;B", help=f"some of: {'; '.join(KINDS)} (default: all)")
    parser.add_argument(
        "--num-hearts", type=int, default=2000, metavar="N", help="to learn from (default: %(default)s)"
    )
    parser.add_argument("--num-cases", type=int, default=48, metavar="N", help="to paint (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of hearts, weights and noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives the networks, 15 MB each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="also show painted hearts there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def held_out_hearts(num_cases: int, train_set: PublicHearts, seed: int) -> Asked:
    """Hearts over the whole range of ejection fractions, with codes on the scale of the training set's."""
    rng = torch.Generator().manual_seed(seed)
    efs, hearts, d = spread_hearts(num_cases, NUM_SLICES, rng)
    masks, pictures = masks_from(d), render(hearts, d, rng)
    codes = _codes(pictures, masks, train_set)
    sketches = recolour(render(hearts, d, rng), masks, codes * train_set.code_std + train_set.code_mean)
    return Asked(efs, masks, pictures, sketches, codes)


def trained(folder: Path, name: str, hearts: PublicHearts, minutes: float, seed: int) -> tuple[Painter, int]:
    """A kind's network and the number of its steps, from `folder` where it is there."""
    path = folder / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors"
    settings = {"minutes": minutes, "seed": seed, "num_pictures": len(hearts.images)}
    if path.exists():
        arrays, metadata = checkpoint.load(path)
        if metadata["settings"] != settings:
            raise UserError(f"{path} was trained with {metadata['settings']}: remove it or give another --out")
        painter = KINDS[name]().eval().requires_grad_(False)
        painter.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
        return painter, metadata["steps"]
    painter, num_steps = train(name, hearts, 60 * minutes, seed)
    arrays = {key: value.numpy() for key, value in painter.state_dict().items()}
    checkpoint.save(path, arrays, {"settings": settings, "steps": num_steps})
    return painter, num_steps


def paint(painter: Painter, hearts: Asked, start_t: float, num_steps: int, seed: int) -> Tensor:
    """Pictures of all slices of all hearts, of the shape of `hearts.pictures`."""
    noise = torch.randn(hearts.pictures.shape, generator=torch.Generator().manual_seed(seed)).flatten(0, 1)
    sketches, masks = hearts.sketches.flatten(0, 1), hearts.masks.flatten(0, 1)
    codes = hearts.codes.repeat_interleave(NUM_SLICES, dim=0)
    parts = [
        painter.paint(sketches[part], masks[part], codes[part], noise[part], start_t, num_steps)
        for part in torch.arange(len(sketches)).split(BATCH_SIZE)
    ]
    return torch.cat(parts).reshape(hearts.pictures.shape)


@torch.inference_mode()
def features(segmenter: Segmenter, pictures: Tensor) -> NDArray[np.float64]:
    """The segmenter's deepest features averaged over positions, shape (pairs, 128), of pictures (N, S, 2, 64, 64)."""
    network = segmenter.network

    def deepest(images: Tensor) -> Tensor:
        x = network.conv_0(images)
        for level in (network.down_1, network.down_2, network.down_3, network.down_4):
            x = level(x)
        return x.float().mean(dim=(2, 3))

    return torch.cat([deepest(part) for part in pictures.flatten(0, 1).split(BATCH_SIZE)]).double().numpy()


def frechet_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Between normal distributions with the means and covariances of two sets of features (Heusel et al. 2017)."""
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    # The trace of a matrix's square root is the sum of the roots of its eigenvalues; of this product all are >= 0.
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None))
    means = float(((first.mean(0) - second.mean(0)) ** 2).sum())
    return means + float(np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def _benchmark(options: argparse.Namespace) -> None:
    names = list(KINDS) if options.kinds is None else [name for name in options.kinds.split(";") if name]
    if unknown := sorted(set(names) - set(KINDS)):
        raise UserError(f"--kinds names {unknown[0]!r}: expected some of {'; '.join(KINDS)}")
    for name, least in (("minutes", 0.01), ("num_hearts", 8), ("num_cases", 2)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    check_outputs(options)
    options.out.mkdir(parents=True, exist_ok=True)
    segmenter = load_segmenter()
    learnt = simulate_hearts(options.num_hearts, options.seed)
    asked = held_out_hearts(options.num_cases, learnt, options.seed + HELD_OUT)
    others = features(segmenter, held_out_hearts(options.num_cases, learnt, options.seed + OTHERS).pictures)

    def judge(kind: str, pictures: Tensor, start_t: float | None = None, num_steps: int | None = None) -> Row:
        cases = stacks(pictures, asked.masks)
        error = float((_codes(pictures, asked.masks, learnt) - asked.codes).abs().mean())
        distance = frechet_distance(features(segmenter, pictures), others)
        agreement = ef_agreement(segmenter, asked.efs.tolist(), cases)
        return Row(kind, start_t, num_steps, **agreement, code_error=error, distance=distance)

    rows = [judge("rendered hearts", asked.pictures), judge("sketches", asked.sketches)]
    shown = {"rendered hearts": asked.pictures, "sketches": asked.sketches}
    for name in names:
        painter, train_steps = trained(options.out, name, learnt, options.minutes, options.seed)
        parameters = sum(parameter.numel() for parameter in painter.unet.parameters())
        for start_t, num_steps in SAMPLERS:
            started = time.perf_counter()
            pictures = paint(painter, asked, start_t, num_steps, options.seed)
            ms = 1000 * (time.perf_counter() - started) / (options.num_cases * NUM_SLICES)
            row = judge(name, pictures, start_t, num_steps)
            rows.append(replace(row, ms_per_pair=ms, train_steps=train_steps, parameters=parameters))
            shown[f"{name}, from {start_t:g}"] = pictures
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


def _codes(pictures: Tensor, masks: Tensor, scale: PublicHearts) -> Tensor:
    """Codes (N, K) standardised as the training set's; a region that a heart lacks has the mean."""
    return torch.nan_to_num((style_vectors(pictures, masks) - scale.code_mean) / scale.code_std, nan=0.0)


def _table(rows: Sequence[Row], options: argparse.Namespace) -> Table:
    table = Table(
        title=f"{options.minutes:g} minutes of training each, {options.num_cases} hearts painted", title_justify="left"
    )
    table.add_column("kind", no_wrap=True)
    for heading in (
        "start",
        "steps",
        "EF: r (95 %)",
        "MAE, points",
        "not found",
        "code: error, sd",
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
            "-" if row.start_t is None else f"{row.start_t:g}",
            show(row.num_steps, 0),
            show(row.r, 3) + interval,
            show(row.mae_points, 1),
            str(row.not_found),
            show(row.code_error, 2),
            show(row.distance, 2),
            show(row.ms_per_pair, 1),
            show(row.train_steps, 0),
        )
    return table


def draw(path: Path, shown: dict[str, Tensor]) -> None:
    """The same hearts' middle slices at end-diastole by every kind, a line each, as a PNG."""
    figure = Figure(figsize=(1.4 * SHOWN + 3, 1.4 * len(shown)), layout="constrained")
    for line, (name, pictures) in enumerate(shown.items()):
        chosen = np.linspace(0, len(pictures) - 1, SHOWN).round().astype(int)
        for place, index in enumerate(chosen):
            axis = figure.add_subplot(len(shown), SHOWN, line * SHOWN + place + 1)
            axis.imshow(pictures[index, NUM_SLICES // 2, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            if place == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
