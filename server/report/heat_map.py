"""The cross-vendor matrix as a picture: who trained, who was read, and by how many EF points it erred."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from server.report.numbers import figure
from server.report.theme import INK, MUTED, RULE, SETTINGS, canvas, svg

MAP = "cividis"
"""Sequential, of one hue to an eye that lacks a cone (Nunez et al. 2018, PLoS ONE 13:e0199239); blue is the small error."""
DARK, LIGHT = "#12161c", "#ffffff"
"""Writing on a cell: by the cell's own brightness, since a cell looks the same in light and dark pages."""
MIN_SPAN_POINTS = 4.0
"""Errors that differ by less get colours that hardly differ, or chance would look like a pattern."""


def colour_range(errors: Sequence[float]) -> tuple[float, float]:
    """The errors at the ends of the colour scale, at least `MIN_SPAN_POINTS` apart."""
    low, high = min(errors, default=0.0), max(errors, default=MIN_SPAN_POINTS)
    return low, max(high, low + MIN_SPAN_POINTS)


def heat_map(
    rows: Mapping[str, Mapping[str, Mapping[str, Any] | None]], own: Mapping[str, str], limits: tuple[float, float]
) -> str:
    """One cell per training set and test group: error and interval, the vendor that trained on itself in a frame.

    Args:
        rows: {training set's name: {test group's name: score}}; None where nobody trained or tested.
        own: {training set's name: test group of the same vendor}.
        limits: Errors at the ends of the colour scale, the same for all matrices of a page.
    """
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    with rc_context(SETTINGS):
        plot, axes = canvas(1.5 + 0.95 * len(columns), 0.6 + 0.62 * len(rows))
        for y, (row, cells) in enumerate(rows.items()):
            for x, column in enumerate(columns):
                _cell(axes, x, y, cells.get(column), Normalize(*limits))
                if own.get(row) == column:
                    axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=2))
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(plot)


def _cell(axes: Axes, x: int, y: int, score: Mapping[str, Any] | None, scale: Normalize) -> None:
    """A coloured square with its figure, or an empty one that says why."""
    error = score["mae_points"] if score else None
    if error is None:
        axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor="none", edgecolor=RULE, hatch="////",
                                 linewidth=1))  # fmt: skip
        axes.text(x, y, "undefined" if score else "not run", ha="center", va="center", fontsize=8.5, color=MUTED)
        return
    assert score is not None
    colour = matplotlib.colormaps[MAP](scale(error))
    ink = DARK if _luminance(colour) > 0.18 else LIGHT
    axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=colour, linewidth=0))
    bounds = score["ci95"]["mae_points"]
    axes.text(x, y - (0.12 if bounds else 0), figure(error, 1), ha="center", va="center", fontsize=12, color=ink)
    if bounds:
        text = f"{figure(bounds[0], 1)}\u2013{figure(bounds[1], 1)}"
        axes.text(x, y + 0.23, text, ha="center", va="center", fontsize=8.5, color=ink)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour, WCAG 2.2: black and white writing contrast alike at 0.18."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
