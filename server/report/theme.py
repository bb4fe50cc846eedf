"""One style for all plots: colours that follow the reader's dark or light setting, SVG as data URIs."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from numpy.typing import NDArray

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


def canvas(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty plot; the HTML report scales it to the width that it has."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.subplots()


def square() -> tuple[Figure, Axes]:
    """An empty square plot with fixed margins: several of them, in rows or columns, have their axes in line."""
    figure = Figure(figsize=(3.3, 2.75))
    return figure, figure.add_axes((0.19, 0.17, 0.65, 0.65 * 3.3 / 2.75))


def percent_axes(axes: Axes, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, size: float) -> None:
    """Marks on square axes from 0 to 90 %, further where a mark lies beyond."""
    x_percent, y_percent = (100 * np.asarray(values, dtype=float) for values in (x, y))
    marks(axes, x_percent, y_percent, size)
    finite = np.concatenate([values[np.isfinite(values)] for values in (x_percent, y_percent)])
    limits = (min(0.0, finite.min(initial=0) - 2), max(90.0, finite.max(initial=0) + 2))
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_locator(MultipleLocator(30))
    axes.yaxis.set_major_locator(MultipleLocator(30))


def marks(axes: Axes, x: NDArray[np.floating], y: NDArray[np.floating], size: float) -> None:
    """One mark per patient, a thin rim apart where they lie on each other."""
    axes.plot(x, y, "o", color=MAIN, markersize=size, alpha=0.8, markeredgecolor=PAPER, markeredgewidth=size / 10)


def svg(figure: Figure, more: Sequence[tuple[str, str, str, str]] = ()) -> str:
    """The figure with the theme's colours as CSS variables, which an SVG image resolves by the reader's setting.

    Args:
        figure: A finished figure.
        more: Further colours of this figure, in the form of `THEME`.
    """
    colours = (*THEME, *more)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(f"'{FONT}'", FONT_STACK)
    for name, stand_in, _, _ in colours:
        text = text.replace(stand_in, f"var({name})")
    light, dark = (";".join(f"{row[0]}:{row[column]}" for row in colours) for column in (2, 3))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    head, rest = text.split("<defs>", 1)
    return data_uri("image/svg+xml", f"{head}{style}<defs>{rest}".encode())


def data_uri(kind: str, content: bytes) -> str:
    """A data URI that embeds the image in the HTML report."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
