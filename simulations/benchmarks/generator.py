"""How faithful generated images are to their condition, and what each step of the sampler buys.

Four figures for every start of the sampler and number of steps: the ejection fraction requested against the one that an
independent segmenter measures on the image, the style vector requested against the one measured, the distance to
a sampler of many steps from the same noise, and the time.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedcmr.server.evaluation.score import score
from fedcmr.server.generation.heart_shapes import Distances, Hearts, distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.server.generation.synthesis import (
    EF_RANGE,
    SharedGenerator,
    SyntheticSet,
    load_shared_generator,
    synthesize,
)
from fedcmr.server.settings import SynthesisConfig
from fedcmr.server.tasks.segmentation.training import measured_ef
from fedcmr.shared.case import Case, CaseInfo
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.style import STYLE_NAMES, StyleDistribution, style_vectors
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter
from fedcmr.shared.version import add_version
from fedcmr.shared.views import PIXEL_MM, slice_pairs

REFERENCE_STEPS = 32
ALMOST_ONE = 0.9999
"""A start of the sampler that leaves the guide as it is."""
SLOPE_SLICES = 3
"""Slices per heart where only style vectors are measured: they are means over a heart's slices."""
PUBLIC = "public"
"""Stands for a vendor where only the public prior generates."""
NUM_BOOTSTRAP = 1000
MAE_TOLERANCE, STYLE_TOLERANCE, DISTANCE_TOLERANCE = 0.3, 0.05, 0.025
"""The knee: fewest steps from which on no figure is worse than the reference's by more than EF points, standard
deviations of the style vector, and grey values that drown in the noise of a scan (0.044 on the public development
patients)."""


@dataclass(frozen=True)
class Measured:
    """One sampler's figures; None where a figure has no meaning.

    Attributes:
        t_start: Where the sampler starts: 0 noise, 1 the guide.
        num_steps: Calls of the generator per image.
        r: Pearson's r of the ejection fraction requested and measured.
        r_ci95: Its 95 % interval over hearts.
        mae_points: Mean absolute difference of the two, EF points.
        not_found: Hearts in which the segmenter found no LV at ED; they are left out of both.
        style_error: Mean absolute difference of the style vectors requested and measured, in the prior's standard
            deviations; 1.13 is what two unrelated normal ones have.
        style_slope: How far an entry of the style vector follows when it alone is requested at -1 and at +1, as a share
            of the 2, mean over entries.
        style_slopes: The same by name.
        distance: Root mean square to the reference of `REFERENCE_STEPS` steps, images in [-1, 1].
        seconds_per_pair: All that `synthesize` does, per ED/ES pair of slices.
    """

    t_start: float | None
    num_steps: int
    r: float | None
    r_ci95: list[float] | None
    mae_points: float | None
    not_found: int
    style_error: float | None = None
    style_slope: float | None = None
    style_slopes: dict[str, float] | None = None
    distance: float | None = None
    seconds_per_pair: float | None = None


def main() -> int:
    """Measure, print the table, write JSON and the plot on request."""
    parser = argparse.ArgumentParser(prog="python -m fedcmr.simulations.benchmarks.generator", description=__doc__)
    add_version(parser)
    parser.add_argument("--prior", type=Path, help="prior's file (default: the one that ships)")
    parser.add_argument("--generator", type=Path, help="a run's generator.safetensors (default: the public prior only)")
    parser.add_argument("--segmenter", type=Path, help="segmenter's file (default: the one that ships)")
    parser.add_argument("--t-start", type=_floats, default=[0.0, 0.3, 0.5], metavar="T,T", help="0,0.3,0.5")
    parser.add_argument(
        "--steps", type=_ints, default=[1, 2, 3, 4, 6, 8, 12, 16], metavar="N,N", help="1,2,3,4,6,8,12,16"
    )
    parser.add_argument("--num-cases", type=int, default=48, metavar="N", help="hearts (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=12345, help="of hearts, style vectors and noise (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="also draw quality against steps there")
    options = parser.parse_args()
    return run_command(lambda: _benchmark(options))


def on_rendered_hearts(segmenter: Segmenter, config: SynthesisConfig, seed: int) -> Measured:
    """The segmenter on rendered hearts that it was not trained on: its own error, where no generator is involved."""
    rng = torch.Generator().manual_seed(seed)
    efs, hearts, d = spread_hearts(config.num_cases, config.num_slices, rng)
    cases = stacks(render(hearts, d, rng), masks_from(d))
    return Measured(None, 0, **ef_agreement(segmenter, efs.tolist(), cases))


def spread_hearts(num: int, num_slices: int, rng: torch.Generator) -> tuple[Tensor, Hearts, Distances]:
    """Hearts whose ejection fractions, returned first, are spread evenly over `EF_RANGE`, and their slices."""
    efs = torch.linspace(*EF_RANGE, num)
    hearts = draw_hearts(num, rng, num_slices, efs)
    return efs, hearts, distances(hearts, slice_positions(hearts, num_slices))


def stacks(images: Tensor, masks: Tensor) -> list[Case]:
    """Cases of images in [-1, 1] and masks, both of shape (N, S, 2, 64, 64)."""
    frames = ((images + 1) / 2).transpose(1, 2).numpy()
    spacing_mm = np.array([1, PIXEL_MM, PIXEL_MM], np.float32)  # the slices' distance plays no part in an EF
    info = CaseInfo("rendered", PUBLIC, float("nan"), float("nan"), "rendered")
    return [Case(info, *arrays, spacing_mm) for arrays in zip(frames, masks.transpose(1, 2).numpy(), strict=True)]


def prior_alone(prior: Prior) -> SharedGenerator:
    """The prior as if a federation had added nothing, with styles of the whole public range.

    `synthesize` without a shared generator takes each guide's own style vector, to which no image could be unfaithful.
    """
    trainable = {name: parameter.detach().clone() for name, parameter in prior.generator.trainable().items()}
    return SharedGenerator(trainable, {PUBLIC: prior.styles})


def measure(
    prior: Prior,
    shared: SharedGenerator,
    segmenter: Segmenter,
    config: SynthesisConfig,
    seed: int,
    reference: Tensor | None,
) -> tuple[Measured, Tensor]:
    """All figures of one sampler.

    Args:
        prior: The public prior.
        shared: What a federation added, or `prior_alone`.
        segmenter: The independent evaluator.
        config: How many hearts and slices; `t_start` and `num_steps` are what is measured.
        seed: Seed of hearts, style vectors and noise, the same for all samplers that are compared.
        reference: The images of many steps; None leaves the distance out.

    Returns:
        The figures and the images, (all slices of all hearts, 2, H, W) in [-1, 1].
    """
    started = time.perf_counter()
    made = synthesize(prior, shared, config, sorted(shared.styles), seed)
    seconds = time.perf_counter() - started
    images = torch.cat([slice_pairs(case, prior.grid)[0] for case in made.cases])
    slopes = style_slopes(prior, shared, config, seed)
    measured = Measured(
        config.t_start,
        config.num_steps,
        **ef_agreement(segmenter, made.requested_efs, made.cases),
        style_error=float((measured_styles(prior, made.cases) - made.styles).abs().mean()),
        style_slope=float(np.mean(list(slopes.values()))),
        style_slopes=slopes,
        distance=None if reference is None else float((images - reference).square().mean().sqrt()),
        seconds_per_pair=seconds / len(images),
    )
    return measured, images


def measured_styles(prior: Prior, cases: Sequence[Case]) -> Tensor:
    """Standardised style vectors of the images of each case, shape (len(cases), K)."""
    stacks = [slice_pairs(case, prior.grid) for case in cases]
    pixel_mm = prior.grid.pixel_mm
    raw = [style_vectors(images[None], masks[None], pixel_mm) for images, masks in stacks]
    return prior.standardise(torch.cat(raw))


def style_slopes(prior: Prior, shared: SharedGenerator, config: SynthesisConfig, seed: int) -> dict[str, float]:
    """How far each entry follows when it alone is requested at -1 and +1, the others at the public mean; 1: wholly.

    Both images of a pair have the same heart, guide and noise.
    """
    num_entries = len(STYLE_NAMES)
    # Every entry is a vendor of its own, so that one call generates all of them.
    num_cases = num_entries * max(1, config.num_cases // (2 * num_entries))
    config = replace(config, num_cases=num_cases, num_slices=SLOPE_SLICES)

    def request(value: float) -> SyntheticSet:
        styles = {
            name: StyleDistribution(value * unit, torch.full((num_entries,), 1e-6), prior.style_correlation)
            for name, unit in zip(STYLE_NAMES, torch.eye(num_entries), strict=True)
        }
        return synthesize(prior, replace(shared, styles=styles), config, STYLE_NAMES, seed)

    low, high = request(-1.0), request(1.0)
    moved = (measured_styles(prior, high.cases) - measured_styles(prior, low.cases)) / 2
    requested_of = [case.info.vendor for case in high.cases]
    return {
        name: float(moved[[vendor == name for vendor in requested_of], k].mean()) for k, name in enumerate(STYLE_NAMES)
    }


def knee(curve: Sequence[Measured], reference: Measured) -> int | None:
    """Fewest steps from which on no sampler of the curve is worse than the reference beyond the tolerances."""
    best = None
    for measured in sorted(curve, key=lambda m: -m.num_steps):
        values = (measured.mae_points, reference.mae_points, measured.style_error, reference.style_error)
        if None in values:
            break
        mae, least_mae, error, least_error = (float(value or 0) for value in values)
        if mae > least_mae + MAE_TOLERANCE or error > least_error + STYLE_TOLERANCE:
            break
        if (measured.distance or 0) > DISTANCE_TOLERANCE:
            break
        best = measured.num_steps
    return best


def _benchmark(options: argparse.Namespace) -> None:
    check_outputs(options)
    prior, segmenter = load_prior(options.prior), load_segmenter(options.segmenter)
    shared = load_shared_generator(options.generator, prior) if options.generator else prior_alone(prior)
    config = SynthesisConfig(num_cases=options.num_cases)
    for t_start, num_steps in itertools.product(options.t_start, options.steps):
        replace(config, t_start=t_start, num_steps=num_steps)  # what is out of range is refused before the work
    rows = [("rendered hearts", on_rendered_hearts(segmenter, config, options.seed))]
    guides = replace(config, t_start=ALMOST_ONE, num_steps=1)
    rows.append(("guides", measure(prior, shared, segmenter, guides, options.seed, None)[0]))
    knees = {}
    for t_start in options.t_start:
        many = replace(config, t_start=t_start, num_steps=REFERENCE_STEPS)
        reference, images = measure(prior, shared, segmenter, many, options.seed, None)
        curve = [
            measure(prior, shared, segmenter, replace(many, num_steps=num_steps), options.seed, images)[0]
            for num_steps in sorted(options.steps)
        ]
        rows += [(f"t_start {t_start:g}", measured) for measured in [*curve, reference]]
        knees[t_start] = knee(curve, reference)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(rows, options))
    for t_start, steps in knees.items():
        found = "not within these steps" if steps is None else f"{steps} steps"
        console.print(f"knee of the curve from t_start {t_start:g}: {found}", highlight=False)
    if options.json:
        figures = {
            "prior_sha256": prior.sha256,
            "generator": str(options.generator) if options.generator else None,
            "num_cases": config.num_cases,
            "num_slices": config.num_slices,
            "seed": options.seed,
            "knee": {f"{t_start:g}": steps for t_start, steps in knees.items()},
            "rows": [{"name": name, **asdict(measured)} for name, measured in rows],
        }
        options.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot:
        draw(options.plot, [measured for _, measured in rows[2:]], rows[0][1])


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse folders that are not there before the work instead of after it.

    Raises:
        UserError: `--json` or `--plot` lies in such a folder.
    """
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.parent.is_dir():
            raise UserError(f"{path.parent} is no folder: give a path for {name} in a folder that is there")


def ef_agreement(segmenter: Segmenter, requested: Sequence[float], cases: Sequence[Case]) -> dict:
    """`r`, `r_ci95`, `mae_points` and `not_found` of `Measured`."""
    pairs = list(zip(requested, measured_ef(segmenter, cases), strict=True))
    found = [pair for pair in pairs if np.isfinite(pair[1])]
    values = score([true for true, _ in found], [seen for _, seen in found], NUM_BOOTSTRAP, seed=0)
    return {
        "r": values["r"],
        "r_ci95": values["ci95"]["r"],
        "mae_points": values["mae_points"],
        "not_found": len(pairs) - len(found),
    }


def _table(rows: Sequence[tuple[str, Measured]], options: argparse.Namespace) -> Table:
    source = "prior and federation" if options.generator else "public prior only"
    table = Table(title=f"{source}, {options.num_cases} hearts: requested and measured", title_justify="left")
    table.add_column("image", no_wrap=True)
    for heading in (
        "steps",
        "EF: r (95 %)",
        "MAE, points",
        "style: error, sd",
        "slope",
        f"to {REFERENCE_STEPS} steps",
        "ms per pair",
    ):
        table.add_column(heading, justify="right", no_wrap=heading.startswith("EF"))

    def show(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    for name, m in rows:
        interval = f" ({m.r_ci95[0]:.3f} to {m.r_ci95[1]:.3f})" if m.r_ci95 else ""
        table.add_row(
            name,
            str(m.num_steps or "-"),
            show(m.r, 3) + interval,
            show(m.mae_points, 1),
            show(m.style_error, 2),
            show(m.style_slope, 2),
            show(m.distance, 3),
            show(m.seconds_per_pair, 1, 1000),
        )
    return table


def draw(path: Path, measured: Sequence[Measured], rendered: Measured) -> None:
    """Quality against the number of steps, one line per start of the sampler, as a PNG."""
    panels = {
        "mae_points": "EF requested and measured:\nmean difference, EF points",
        "style_error": "style vector:\nmean difference, sd",
        "distance": f"distance to {REFERENCE_STEPS} steps\nfrom the same noise",
        "seconds_per_pair": "seconds per ED/ES pair",
    }
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for t_start in sorted({m.t_start for m in measured if m.t_start is not None}):
            points = [(m.num_steps, getattr(m, name)) for m in measured if m.t_start == t_start]
            known = [(steps, value) for steps, value in points if value is not None]
            axis.plot(*zip(*known, strict=True), "o-", label=f"t_start {t_start:g}")
        if name == "mae_points" and rendered.mae_points is not None:
            axis.axhline(rendered.mae_points, color="grey", linestyle=":", label="rendered hearts")
        axis.set(title=title, xlabel="steps", xscale="log", ylim=(0, None))
        steps = sorted({m.num_steps for m in measured})
        axis.set_xticks(steps, [str(value) for value in steps])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
