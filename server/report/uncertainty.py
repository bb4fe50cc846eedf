"""Calibration of the predictive uncertainty: observed coverage of its intervals against their nominal coverage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.ticker import MultipleLocator

from fedcmr.server.formatting import percent
from fedcmr.server.report.theme import MODEL_COLOURS, MODEL_MARKERS, MUTED, PAPER, SETTINGS, canvas, svg

REPORTED_NOMINAL = 0.9
"""Nominal coverage of the interval that the text reports, or the nearest that was measured."""


@dataclass(frozen=True)
class Uncertainty:
    """One test set's row.

    Attributes:
        test_set: Name of the test set.
        figures: Its part of `report.json`: n_patients, mean_sd_points, coverage, rank_correlation.
        coverage: {nominal coverage: its row of `coverage`}.
        verdict: A sentence for the reader.
    """

    test_set: str
    figures: Mapping[str, Any]
    coverage: Mapping[float, Mapping[str, Any]]
    verdict: str


def uncertainties(report: Mapping[str, Any]) -> list[Uncertainty]:
    """Every test set for which the network predicted its uncertainty."""
    sets = report.get("uncertainty") or {}
    return [
        Uncertainty(name, figures, {row["nominal"]: row for row in figures["coverage"]}, verdict(figures["coverage"]))
        for name, figures in sets.items()
    ]


def verdict(coverage: list[Mapping[str, Any]]) -> str:
    """Whether the observed coverage agrees with the nominal one; empty where none was measured."""
    measured = [row for row in coverage if row["observed"] is not None]
    if not measured:
        return ""
    row = min(measured, key=lambda row: abs(row["nominal"] - REPORTED_NOMINAL))
    bounds = row.get("ci95")
    inside = f" ({percent(bounds[0])} to {percent(bounds[1])})" if bounds else ""
    text = f"Coverage of the {percent(row['nominal'])} intervals is {percent(row['observed'])}{inside}"
    if not bounds:
        return f"{text}."
    if bounds[0] <= row["nominal"] <= bounds[1]:
        return f"{text}: within chance of the nominal coverage."
    if row["observed"] < row["nominal"]:
        return f"{text}: too narrow, the predicted SD is too small."
    return f"{text}: too wide, the predicted SD is too large."


def calibration(report: Mapping[str, Any]) -> str | None:
    """Observed against nominal coverage of the network's intervals; None where none was measured."""
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
        axes.set(xlim=(0, 102), ylim=(0, 102), xlabel="nominal coverage (%)", ylabel="observed coverage (%)")
        axes.set_box_aspect(1)
        axes.grid()
        axes.xaxis.set_major_locator(MultipleLocator(25))
        axes.yaxis.set_major_locator(MultipleLocator(25))
        if len(sets) > 1:
            axes.legend(loc="upper left")
        return svg(plot)
