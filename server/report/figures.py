"""The report's figures as data URIs: SVG for plots, which follow the reader's dark or light setting, PNG for scans."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, MultipleLocator
from numpy.typing import NDArray

HUMAN_POINTS = (4.6, 7.5)
"""EF points by which experienced readers differ: seven core labs, Suinesiaputra et al. (2015), JCMR 17:63."""

# Stand-ins that become CSS variables in the finished SVG: name, stand-in, light, dark.
THEME = (
    ("--ink", "#010101", "#1b1e22", "#e9e6df"),
    ("--muted", "#020202", "#5b626b", "#a3abb4"),
    ("--rule", "#030303", "#e1e0da", "#30353b"),
    ("--band", "#040404", "#e9e4d4", "#34322a"),
    ("--paper", "#050505", "#ffffff", "#1a1d21"),
    ("--main", "#060606", "#0072b2", "#4aa8e0"),
)
INK, MUTED, RULE, BAND, PAPER, MAIN = (stand_in for _, stand_in, _, _ in THEME)
MODEL_COLOURS = (MAIN, "#d55e00", "#009e73", "#cc79a7", "#b08a00", "#7f7f7f")
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P")
"""The main model first, then Okabe & Ito's colour-blind safe set; with a marker each, colour alone carries nothing."""
FONT = "DejaVu Sans"
FONT_STACK = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcmr",
    "font.family": FONT,
    "font.size": 10.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
}


def scatter(true: Sequence[float], predicted: Sequence[float]) -> str:
    """Predicted against true ejection fraction in per cent, with the identity line and the readers' band."""
    with rc_context(SETTINGS):
        figure, axes = _canvas(3.3, 3.3)
        line = np.array([0.0, 100.0])
        for points, alpha in zip(reversed(HUMAN_POINTS), (0.5, 1.0), strict=True):
            axes.fill_between(line, line - points, line + points, color=BAND, alpha=alpha, linewidth=0)
        axes.plot(line, line, color=MUTED, linewidth=1)
        _percent_axes(axes, true, predicted, "true EF (%)", "predicted EF (%)", size=6.5)
        return _svg(figure)


def error_intervals(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Mean absolute error with its interval for every group of patients and model, beside the readers' band.

    Args:
        rows: {group of patients: {model's name: score}}; undefined scores leave a gap.
    """
    models = list(dict.fromkeys(model for scores in rows.values() for model in scores))
    spacing = 0.24 if len(models) < 4 else 0.8 / len(models)
    with rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 0.9 + 0.22 * len(rows) * max(3, len(models) + 1))
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
                axes.plot(values["mae_points"], y, marker, color=colour, markerfacecolor=filled, markersize=6.5,
                          label=label)  # fmt: skip
                label = None
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="mean absolute error (EF points)")
        axes.set_xlim(left=0)
        handles, _ = axes.get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower left", ncols=min(2, max(1, len(models))), handletextpad=0.2,
                      columnspacing=1.4)  # fmt: skip
        return _svg(figure)


def requested_against_measured(
    requested: Sequence[float], measured: Sequence[float], agreement: Mapping[str, Any]
) -> str:
    """The ejection fraction asked for against the one measured on the synthetic picture, in per cent.

    Args:
        requested: Shape (N,).
        measured: Shape (N,).
        agreement: Their `server.evaluation.score`.
    """
    with rc_context(SETTINGS):
        figure, axes = _canvas(3.3, 3.3)
        axes.plot([-100, 200], [-100, 200], color=MUTED, linewidth=1)
        _percent_axes(axes, requested, measured, "requested EF (%)", "measured EF (%)", size=3)
        r = "undefined" if agreement["r"] is None else f"{agreement['r']:.3f}"
        text = f"r = {r}\nMAE {agreement['mae_points']:.1f} points"
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", linespacing=1.4)
        return _svg(figure)


def training_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Training loss over steps, one line per model, on a logarithmic axis."""
    with rc_context(SETTINGS):
        figure, axes = _canvas(4.9, 3.0)
        for k, (name, (steps, losses)) in enumerate(curves.items()):
            colour, style = MODEL_COLOURS[k % 6], ("-", "--", ":", "-.")[k % 4]
            axes.plot(steps, losses, style, color=colour, linewidth=1.6, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(loc="upper right")
        return _svg(figure)


def sample_sheet(pictures: NDArray[np.floating]) -> str:
    """A contact sheet: one column per patient or slice, end-diastole above end-systole.

    Args:
        pictures: Shape (N, 2, H, W) in [0, 1]; 0 is black and 1 white in every sheet.

    Returns:
        A PNG as a data URI.
    """
    num, _, height, width = pictures.shape
    gap = max(2, width // 32)
    sheet = np.zeros((2 * height + gap, num * (width + gap) - gap, 4), np.float64)
    for i, phases in enumerate(pictures):
        for phase, picture in enumerate(phases):
            rows, columns = phase * (height + gap), i * (width + gap)
            sheet[rows : rows + height, columns : columns + width, :3] = np.clip(picture, 0, 1)[..., None]
            sheet[rows : rows + height, columns : columns + width, 3] = 1  # gaps stay transparent
    return png(sheet)


def png(picture: NDArray[np.floating]) -> str:
    """A picture of shape (H, W, 4), RGBA in [0, 1], as the data URI of a PNG."""
    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return _data_uri("image/png", buffer.getvalue())


def _canvas(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def _percent_axes(axes: Axes, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, size: float) -> None:
    """Marks on square axes from 0 to 90 %, further where a mark lies beyond."""
    x_percent, y_percent = (100 * np.asarray(values, dtype=float) for values in (x, y))
    axes.plot(x_percent, y_percent, "o", color=MODEL_COLOURS[0], markersize=size, alpha=0.8, markeredgecolor=PAPER,
              markeredgewidth=size / 10)  # fmt: skip
    finite = np.concatenate([values[np.isfinite(values)] for values in (x_percent, y_percent)])
    limits = (min(0.0, finite.min(initial=0) - 2), max(90.0, finite.max(initial=0) + 2))
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MultipleLocator(30))
    axes.yaxis.set_major_locator(MultipleLocator(30))


def _svg(figure: Figure) -> str:
    """The figure with the theme's colours as CSS variables, which an SVG picture resolves by the reader's setting."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().replace(f"'{FONT}'", FONT_STACK)
    for name, stand_in, _, _ in THEME:
        svg = svg.replace(stand_in, f"var({name})")
    light, dark = (";".join(f"{row[0]}:{row[column]}" for row in THEME) for column in (2, 3))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    head, rest = svg.split("<defs>", 1)
    return _data_uri("image/svg+xml", f"{head}{style}<defs>{rest}".encode())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
