"""Which images the report shows: real patients next to synthetic ones, and the best and worst predictions.

An image carries a vendor and ejection fractions, never a pseudonym, a group or a date.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import Case
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices
from fedcmr.shared.views import NETWORK_GRID, Grid, slice_pairs

NUM_SAMPLES = 5
"""Patients per vendor and row."""
NUM_LARGE = 2
"""Patients per vendor and row where images are shown large."""
NUM_EXTREMES = 4
NUM_SLICES = 3
"""Slices of a best or worst case, from the part of the stack that the network sees."""


@dataclass(frozen=True)
class Row:
    """ED/ES pairs of several patients, and the ejection fraction of each.

    Attributes:
        images: Shape (N, 2, H, W) in [0, 1], a slice from the middle of the heart.
        efs: Shape (N,).
    """

    images: NDArray[np.floating]
    efs: Sequence[float]


@dataclass(frozen=True)
class SampleSheet:
    """Images of one vendor, on one grid and field of view; `real` is None where there are none to show."""

    synthetic: Row
    real: Row | None = None


@dataclass(frozen=True)
class Extreme:
    """A test patient with a very small or a very large error.

    Attributes:
        vendor: Manufacturer of the scanner.
        true: Ejection fraction.
        predicted: The network's prediction.
        images: Shape (S, 2, H, W) in [0, 1]: slices from base to apex.
    """

    vendor: str
    true: float
    predicted: float
    images: NDArray[np.floating]


def sample_sheets(
    synthetic: Sequence[Case], real: Sequence[Case], num: int = NUM_SAMPLES, grid: Grid = NETWORK_GRID
) -> dict[str, SampleSheet]:
    """Per vendor: real patients over the whole range of ejection fractions, and synthetic ones with similar values.

    Columns are matched by ejection fraction, so that what differs is the image and not the heart's state.

    Args:
        synthetic: Synthetic cases.
        real: Test patients who may be shown.
        num: Most patients per vendor and row.
        grid: Of the images.
    """
    sheets = {}
    for vendor in sorted({case.info.vendor for case in synthetic}):
        made, scanned = (
            sorted((c for c in cases if c.info.vendor == vendor and c.info.ef == c.info.ef), key=lambda c: c.info.ef)
            for cases in (synthetic, real)
        )
        shown = _evenly(scanned, num)
        matched = [_take_nearest(made, case.info.ef) for case in shown if made] if shown else _evenly(made, num)
        if matched:
            sheets[vendor] = SampleSheet(_row(matched, grid), _row(shown, grid) if shown else None)
    return sheets


def extremes(cases: Sequence[Case], predicted: Sequence[float]) -> tuple[list[Extreme], list[Extreme]]:
    """The patients with the smallest and with the largest error, best and worst first; nobody is in both.

    Args:
        cases: Test patients with a known ejection fraction.
        predicted: Shape (len(cases),), the network's predictions.
    """
    if len(cases) != len(predicted):
        raise ValueError(f"Expected one prediction per patient, got {len(predicted)} for {len(cases)}.")
    errors = np.abs(np.asarray(predicted) - [case.info.ef for case in cases])
    order = [int(i) for i in np.argsort(errors, kind="stable") if np.isfinite(errors[i])]
    num = min(NUM_EXTREMES, len(order) // 2)
    chosen = (order[:num], order[::-1][:num])
    best, worst = ([_extreme(cases[i], predicted[i]) for i in indices] for indices in chosen)
    return best, worst


def _evenly(cases: list[Case], num: int) -> list[Case]:
    """At most `num` of a sorted list, its ends included."""
    places = np.linspace(0, len(cases) - 1, num).round().astype(int) if len(cases) > num else None
    return cases if places is None else [cases[place] for place in places]


def _take_nearest(cases: list[Case], ef: float) -> Case:
    """The case whose ejection fraction is nearest, taken out of the list while others are left."""
    nearest = min(range(len(cases)), key=lambda i: abs(cases[i].info.ef - ef))
    return cases.pop(nearest) if len(cases) > 1 else cases[nearest]


def _row(cases: list[Case], grid: Grid) -> Row:
    return Row(np.stack([_middle(case, 1, grid)[0] for case in cases]), [case.info.ef for case in cases])


def _extreme(case: Case, predicted: float) -> Extreme:
    return Extreme(case.info.vendor, case.info.ef, float(predicted), _middle(case, NUM_SLICES))


def _middle(case: Case, num: int, grid: Grid = NETWORK_GRID) -> NDArray[np.float32]:
    """At most `num` slices, evenly spread over the part of the stack that the network sees.

    Returns:
        Shape (S, 2, size, size) in [0, 1].
    """
    stack = slice_pairs(case, grid)[0]
    seen = stack[middle_slices(len(stack))]
    places = ((np.arange(num) + 0.5) * len(seen) / num).astype(int)
    return ((seen[sorted(set(places.tolist()))] + 1) / 2).numpy()
