"""The report's figures as data URIs: SVG for plots, which follow the reader's dark or light setting, PNG for scans."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedcmr.server.formatting import HUMAN_POINTS
from fedcmr.server.report.theme import (
    BAND,
    INK,
    MODEL_COLOURS,
    MODEL_MARKERS,
    MUTED,
    PAPER,
    SETTINGS,
    canvas,
    data_uri,
    percent_axes,
    svg,
)


def error_intervals(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean absolute error with its interval for every group of patients and model, with the readers' band.

    Args:
        rows: {group of patients: {model's name: score}}; undefined scores leave a gap.
    """
    models = list(dict.fromkeys(model for scores in rows.values() for model in scores))
    spacing = 0.24 if len(models) < 4 else 0.8 / len(models)
    with rc_context(SETTINGS):
        figure, axes = canvas(4.9, 0.9 + 0.22 * len(rows) * max(3, len(models) + 1))
        axes.axvspan(*HUMAN_POINTS, color=BAND, linewidth=0)
        for k, model in enumerate(models):
            colour, marker = MODEL_COLOURS[k % 6], MODEL_MARKERS[k % 6]
            label: str | None = model
            for place, scores in enumerate(rows.values()):
                values = scores.get(model)
                if not values or values["mae_points"] is None:
                    continue
                y = place + (k - (len(models) - 1) / 2) * spacing
                interval = values["ci95"]["mae_points"]
                if interval:
                    axes.plot(interval, [y, y], color=colour, linewidth=1.6, solid_capstyle="round")
                filled = colour if k == 0 else PAPER
                axes.plot(
                    values["mae_points"], y, marker, color=colour, markerfacecolor=filled, markersize=6.5, label=label
                )
                label = None
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="mean absolute error (EF points)")
        axes.set_xlim(left=0)
        handles, _ = axes.get_legend_handles_labels()
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=min(2, max(1, len(models))),
            handletextpad=0.2,
            columnspacing=1.4,
        )
        return svg(figure)


def requested_against_measured(
    requested: Sequence[float], measured: Sequence[float], agreement: Mapping[str, Any]
) -> str:
    """The requested ejection fraction against the one measured on the synthetic image, in per cent.

    Args:
        requested: Shape (N,).
        measured: Shape (N,).
        agreement: Their `fedcmr.server.evaluation.score.score`.
    """
    with rc_context(SETTINGS):
        figure, axes = canvas(3.3, 3.3)
        axes.plot([-100, 200], [-100, 200], color=MUTED, linewidth=1)
        percent_axes(axes, requested, measured, "requested EF (%)", "measured EF (%)", size=3)
        r = "undefined" if agreement["r"] is None else f"{agreement['r']:.3f}"
        text = f"r = {r}\nMAE {agreement['mae_points']:.1f} points"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", linespacing=1.4)
        return svg(figure)


def training_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Training loss over steps, one line per model, on a logarithmic axis."""
    with rc_context(SETTINGS):
        figure, axes = canvas(4.9, 3.0)
        for k, (name, (steps, losses)) in enumerate(curves.items()):
            colour, style = MODEL_COLOURS[k % 6], ("-", "--", ":", "-.")[k % 4]
            axes.plot(steps, losses, style, color=colour, linewidth=1.6, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(loc="upper right")
        return svg(figure)


def sample_sheet(images: NDArray[np.floating]) -> str:
    """A contact sheet: one column per patient or slice, end-diastole above end-systole.

    Args:
        images: Shape (N, 2, H, W) in [0, 1]; 0 is black and 1 white in every sheet.

    Returns:
        A PNG as a data URI.
    """
    num, _, height, width = images.shape
    gap = max(2, width // 32)
    sheet = np.zeros((2 * height + gap, num * (width + gap) - gap, 4), np.float64)
    for i, phases in enumerate(images):
        for phase, image in enumerate(phases):
            rows, columns = phase * (height + gap), i * (width + gap)
            sheet[rows : rows + height, columns : columns + width, :3] = np.clip(image, 0, 1)[..., None]
            sheet[rows : rows + height, columns : columns + width, 3] = 1  # gaps stay transparent
    return png(sheet)


def png(image: NDArray[np.floating]) -> str:
    """An image of shape (H, W, 4), RGBA in [0, 1], as the data URI of a PNG."""
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return data_uri("image/png", buffer.getvalue())
