"""The cross-vendor evaluation as a heat map: who trained, who was tested, and the mean error in EF points."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from fedcmr.server.formatting import figure
from fedcmr.server.report.theme import INK, MUTED, RULE, SETTINGS, canvas, svg

MAP = "YlOrBr"
"""Sequential and safe for every colour vision (Harrower & Brewer 2003, ColorBrewer): lightness carries the value."""
NUM_STEPS = 9
DARK, LIGHT = "#1b1e22", "#ffffff"
"""Text on a cell, whichever contrasts more."""
MIN_SPAN_POINTS = 4.0
"""Least span of the colour scale in EF points: smaller differences must not look like a pattern."""


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour, WCAG 2.2: black and white text contrast alike at 0.18."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _steps() -> tuple[tuple[str, str, str, str], ...]:
    """The colours of the cells, then those of their text, in the form of `THEME`.

    A large error stands out from the background: it is dark on a light one and light on a dark one.
    """
    places = {"light": np.linspace(0.04, 0.82, NUM_STEPS), "dark": np.linspace(0.98, 0.2, NUM_STEPS)}
    cells = {scheme: matplotlib.colormaps[MAP](values) for scheme, values in places.items()}
    ink = {scheme: [DARK if _luminance(cell) > 0.18 else LIGHT for cell in values] for scheme, values in cells.items()}
    return (
        *(
            (f"--cell{k}", f"#07{k:02d}01", to_hex(cells["light"][k]), to_hex(cells["dark"][k]))
            for k in range(NUM_STEPS)
        ),
        *((f"--text{k}", f"#07{k:02d}02", ink["light"][k], ink["dark"][k]) for k in range(NUM_STEPS)),
    )


STEPS = _steps()


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
        limits: Errors at the ends of the colour scale, the same for all heat maps of a report.
    """
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    with rc_context(SETTINGS):
        plot, axes = canvas(1.15 + 0.8 * len(columns), 0.5 + 0.56 * len(rows))
        for y, (row, cells) in enumerate(rows.items()):
            for x, column in enumerate(columns):
                _cell(axes, x, y, cells.get(column), limits)
                if own.get(row) == column:
                    axes.add_patch(_square(x, y, 0.45, facecolor="none", edgecolor=INK, linewidth=2))
        axes.set(xlim=(-0.54, len(columns) - 0.46), ylim=(len(rows) - 0.46, -0.54))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(plot, STEPS)


def step_of(error: float, limits: tuple[float, float]) -> int:
    """Which of the `NUM_STEPS` colours an error has, the smallest first."""
    low, high = limits
    return int(np.clip((error - low) / (high - low) * NUM_STEPS, 0, NUM_STEPS - 1))


def _cell(axes: Axes, x: int, y: int, score: Mapping[str, Any] | None, limits: tuple[float, float]) -> None:
    """A coloured square with its figure, or an empty one that says why."""
    error = score["mae_points"] if score else None
    if score is None or error is None:
        axes.add_patch(_square(x, y, 0.46, facecolor="none", edgecolor=RULE, linewidth=1, hatch="////"))
        axes.text(x, y, "undefined" if score else "not run", ha="center", va="center", fontsize=9, color=MUTED)
        return
    step = step_of(error, limits)
    cell, ink = STEPS[step][1], STEPS[NUM_STEPS + step][1]
    axes.add_patch(_square(x, y, 0.46, facecolor=cell, linewidth=0))
    bounds = score["ci95"]["mae_points"]
    axes.text(x, y - (0.12 if bounds else 0), figure(error, 1), ha="center", va="center", fontsize=12, color=ink)
    if bounds:
        text = f"{figure(bounds[0], 1)}\u2013{figure(bounds[1], 1)}"
        axes.text(x, y + 0.23, text, ha="center", va="center", fontsize=9, color=ink)


def _square(x: int, y: int, half: float, **style: Any) -> Rectangle:
    return Rectangle((x - half, y - half), 2 * half, 2 * half, **style)
