"""Whether the network knows when it is wrong: how many patients its intervals hold, against how many they promise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MultipleLocator

from fedcmr.server.formatting import percent
from fedcmr.server.report.theme import MODEL_COLOURS, MODEL_MARKERS, MUTED, PAPER, SETTINGS, canvas, svg

TOLD_NOMINAL = 0.9
"""The interval that the page speaks of, or the nearest that was measured."""


@dataclass(frozen=True)
class Uncertainty:
    """One test set's row.

    Attributes:
        test_set: Its name.
        figures: Of `report.json`: n_patients, mean_sd_points, coverage, rank_correlation.
        held: {nominal coverage: its row of `coverage`}.
        verdict: In words.
    """

    test_set: str
    figures: Mapping[str, Any]
    held: Mapping[float, Mapping[str, Any]]
    verdict: str


def uncertainties(report: Mapping[str, Any]) -> list[Uncertainty]:
    """Of every test set where the network told its uncertainty."""
    sets = report.get("uncertainty") or {}
    return [
        Uncertainty(name, figures, {row["nominal"]: row for row in figures["coverage"]}, verdict(figures["coverage"]))
        for name, figures in sets.items()
    ]


def verdict(coverage: list[Mapping[str, Any]]) -> str:
    """Whether the intervals hold as many patients as they promise; empty where none was measured."""
    measured = [row for row in coverage if row["observed"] is not None]
    if not measured:
        return ""
    row = min(measured, key=lambda row: abs(row["nominal"] - TOLD_NOMINAL))
    bounds = row.get("ci95")
    inside = f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else ""
    told = (
        f"Intervals that should hold {percent(row['nominal'])} of the patients hold {percent(row['observed'])}{inside}"
    )
    if not bounds:
        return f"{told}."
    if bounds[0] <= row["nominal"] <= bounds[1]:
        return f"{told}: within chance of what they promise."
    if row["observed"] < row["nominal"]:
        return f"{told}: too narrow, the network is surer than it should be."
    return f"{told}: too wide, the network is less sure than it could be."


def calibration(report: Mapping[str, Any]) -> str | None:
    """Share of patients inside the network's intervals against the share promised; None where none was measured."""
    sets = {
        name: rows
        for name, figures in (report.get("uncertainty") or {}).items()
        if (rows := [row for row in figures["coverage"] if row["observed"] is not None])
    }
    if not sets:
        return None
    with rc_context(SETTINGS):
        plot, axes = canvas(3.3, 3.3)
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1)
        for k, (name, rows) in enumerate(sets.items()):
            colour = MODEL_COLOURS[k % len(MODEL_COLOURS)]
            x, y = ([100 * row[key] for row in rows] for key in ("nominal", "observed"))
            for row in rows:
                if bounds := row.get("ci95"):
                    axes.plot(
                        [100 * row["nominal"]] * 2, [100 * bound for bound in bounds], color=colour, linewidth=1.6
                    )
            axes.plot(
                x,
                y,
                marker=MODEL_MARKERS[k % len(MODEL_MARKERS)],
                color=colour,
                markersize=6.5,
                linewidth=1,
                markeredgecolor=PAPER,
                label=name,
            )
        axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="promised (%)", ylabel="held (%)")
        axes.set_box_aspect(1)
        axes.grid()
        axes.xaxis.set_major_locator(MultipleLocator(25))
        axes.yaxis.set_major_locator(MultipleLocator(25))
        if len(sets) > 1:
            axes.legend(loc="upper left")
        return svg(plot)
