"""Formatting of numbers, lists and provenances in reports, cards and on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedcmr.shared.provenance import MIXED, PUBLIC, SIMULATED

HUMAN_POINTS = (4.6, 7.5)
"""EF points by which experienced readers differ: seven core labs, Suinesiaputra et al. (2015), JCMR 17:63."""


def figure(value: float | None, digits: int) -> str:
    """A number with a true minus sign and no negative zero; what is undefined says so."""
    if value is None:
        return "undefined"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = figure(value, digits)
    return text if value < 0 or float(text) == 0 else f"+{text}"


def interval(bounds: Sequence[float] | None, digits: int) -> str:
    """An interval, "low to high"; empty where there is none."""
    return f"{figure(bounds[0], digits)} to {figure(bounds[1], digits)}" if bounds else ""


def percent(fraction: float) -> str:
    """Whole per cent; the space does not break."""
    return f"{round(100 * fraction) + 0}\u00a0%".replace("-", "\u2212")


def seconds(value: float) -> str:
    """A duration in seconds or minutes."""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.1f} min"


def size(num_bytes: float) -> str:
    """A message's size."""
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def patients(num: int) -> str:
    """So many patients, in the right number."""
    return f"{num} patient{'' if num == 1 else 's'}"


def listed(names: Sequence[Any]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


def describe_scans(entry: Mapping[str, Any]) -> str:
    """A provenance for a table's cell."""
    match entry["kind"]:
        case kind if kind == SIMULATED:
            return "simulated"
        case kind if kind == PUBLIC:
            return f"real, public: {entry['source']}"
        case kind if kind == MIXED:
            return "some simulated, some real"
    return f"real, private{' or public: ' + entry['source'] if entry['source'] else ''}"
