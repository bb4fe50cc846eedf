"""Each test patient as a mark: predicted against true, and Bland and Altman's difference against the mean of both."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray

from fedcmr.server.formatting import HUMAN_POINTS, figure
from fedcmr.server.report.theme import BAND, INK, MAIN, MUTED, SETTINGS, marks, percent_axes, square, svg

MARK_SIZE = 6.5
LIMITS = (("bias_points", "-"), ("loa_high_points", "--"), ("loa_low_points", "--"))
"""The lines of a Bland-Altman plot: figure of the score, style."""
SHOWN_POINTS = 20.0
"""Half the height of a Bland-Altman plot, so that vendors compare; more where a mark or a limit lies beyond."""


def scatter(true: Sequence[float], predicted: Sequence[float], sd: Sequence[float | None] | None = None) -> str:
    """Predicted against true ejection fraction in per cent, with the identity line and the readers' band.

    Args:
        true: Shape (N,).
        predicted: Shape (N,).
        sd: Shape (N,), the predicted SD of each error, None where unknown: a bar of one SD above and below.
    """
    with rc_context(SETTINGS):
        plot, axes = square()
        line = np.array([0.0, 100.0])
        for points, alpha in zip(reversed(HUMAN_POINTS), (0.5, 1.0), strict=True):
            axes.fill_between(line, line - points, line + points, color=BAND, alpha=alpha, linewidth=0)
        axes.plot(line, line, color=MUTED, linewidth=1)
        if sd is not None:
            bars = 100 * np.array([np.nan if value is None else value for value in sd], dtype=float)
            x, y = (100 * np.asarray(values, dtype=float) for values in (true, predicted))
            axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=MAIN, elinewidth=1.1, alpha=0.6)
        percent_axes(axes, true, predicted, "true EF (%)", "predicted EF (%)", size=MARK_SIZE)
        return svg(plot)


def bland_altman(true: Sequence[float], predicted: Sequence[float], score: Mapping[str, Any] | None) -> str:
    """Predicted minus true ejection fraction against the mean of both, in EF points and per cent.

    Bland & Altman (1986), Lancet 327:307-310: the bias and the limits that hold 95 % of the patients, each a line with
    its figure, and its interval as a bar, at the right end.

    Args:
        true: Shape (N,).
        predicted: Shape (N,).
        score: The patients' figures as in the table, so that plot and table agree; None where there are none.
    """
    t, p = (100 * np.asarray(values, dtype=float) for values in (true, predicted))
    mean, difference = (t + p) / 2, p - t
    with rc_context(SETTINGS):
        plot, axes = square()
        for points, alpha in zip(reversed(HUMAN_POINTS), (0.5, 1.0), strict=True):
            axes.axhspan(-points, points, color=BAND, alpha=alpha, linewidth=0)
        drawn = _lines(axes, score or {})
        marks(axes, mean, difference, MARK_SIZE)
        shown = np.abs([*difference[np.isfinite(difference)], *drawn]).max(initial=SHOWN_POINTS - 2) + 2
        axes.set(
            xlim=_range(mean),
            ylim=(-shown, shown),
            xlabel="mean of true and predicted EF (%)",
            ylabel="predicted \u2212 true (points)",
        )
        axes.xaxis.set_major_locator(MultipleLocator(30))
        axes.yaxis.set_major_locator(MultipleLocator(10 if shown < 45 else 30))
        return svg(plot)


def _lines(axes: Axes, score: Mapping[str, Any]) -> list[float]:
    """Bias and limits of agreement, those that are defined; returns all heights that were drawn at."""
    heights = []
    for metric, style in LIMITS:
        value = score.get(metric)
        if value is None:
            continue
        axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=style)
        axes.annotate(
            figure(value, 1),
            (1.01, value),
            va="center",
            xycoords=("axes fraction", "data"),
            fontsize=9.5,
            color=INK,
            annotation_clip=False,
        )
        heights.append(value)
        if bounds := score["ci95"].get(metric):
            axes.plot(
                [0.965, 0.965],
                bounds,
                color=MUTED,
                linewidth=3,
                alpha=0.7,
                solid_capstyle="butt",
                transform=axes.get_yaxis_transform(),
            )
            heights.extend(bounds)
    return heights


def _range(percent: NDArray[np.floating]) -> tuple[float, float]:
    """From 0 to 90 %, further where a mark lies beyond."""
    finite = percent[np.isfinite(percent)]
    return min(0.0, float(finite.min(initial=0)) - 2), max(90.0, float(finite.max(initial=0)) + 2)
