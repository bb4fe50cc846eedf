"""Draws docs/hearts.png: synthetic hearts of each vendor of a study, from a weak to a strong one.

.venv/bin/fedcmr-simulate                          # the default study: its hospitals are simulated
.venv/bin/python docs/figure.py runs/default
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import fedcmr
from fedcmr.shared.case import ED, ES, LV, MYO, RV, Case

PATH = Path(__file__).resolve().parent / "hearts.png"
EFS = (0.2, 0.4, 0.6)
COLOURS = {RV: "#3f8fff", MYO: "#3fd04f", LV: "#f2a33a"}
NUM_COLOURS = 64
"""Of the file's palette; enough for greys and three contours."""


def draw(study: str) -> None:
    """One row a vendor; for each ejection fraction the middle slice at end-diastole and at end-systole."""
    rows = {}
    for vendor in ("Siemens", "Philips", "GE"):
        rows[vendor] = [fedcmr.synthesize(study, number=1, vendor=vendor, ef=(ef, ef), seed=11)[0] for ef in EFS]
    figure = Figure(figsize=(8, 4.35), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2 * len(EFS), gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for row, (vendor, cases) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(vendor, fontsize=11)
        for column, case in enumerate(cases):
            _show(row[2 * column], case, ED)
            _show(row[2 * column + 1], case, ES)
            row[2 * column + 1].text(
                0.97, 0.03, f"EF {100 * case.info.ef:.0f} %", color="white", fontsize=8, ha="right",
                transform=row[2 * column + 1].transAxes,
            )  # fmt: skip
    for column, axis in enumerate(axes[0]):
        axis.set_title("end-systole" if column % 2 else "end-diastole", fontsize=9)
    figure.subplots_adjust(left=0.04, right=0.995, top=0.94, bottom=0.01)
    figure.canvas.draw()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])  # type: ignore[attr-defined]
    drawn.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(PATH, optimize=True)


def _show(axis: matplotlib.axes.Axes, case: Case, phase: int) -> None:
    """The middle slice with the contours of its labels."""
    middle = case.frames.shape[1] // 2
    axis.imshow(case.frames[phase, middle], cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    for label, colour in COLOURS.items():
        axis.contour(case.masks[phase, middle] == label, [0.5], colors=colour, linewidths=0.8)
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    draw(sys.argv[1])
