"""Masks that cannot be a heart: what a wrong label map or a shifted file looks like."""

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.centring import find_frames
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import LV, MYO, is_heart
from fedcmr.shared.ejection_fraction import ejection_fraction

MIN_MYOCARDIUM_AT_BORDER = 0.5
"""Share of the cavity's border that must touch myocardium. 0.996 and more in 20 ACDC and 3 M&Ms patients; a basal slice
may miss the part towards the outflow tract. With swapped labels it is below 0.45: a right ventricle touches the septum
only, and a ring taken for the cavity has half its border outside."""
MAX_EF = 0.95
"""No ventricle empties further: such a mask misses slices at end-systole."""
MAX_EXTENT_MM = 180.0
"""Extent of all labels along rows or columns. The largest of 23 patients is 132 mm; more is a stray label, or a wrong
spacing."""


def check_masks(cine: Cine) -> None:
    """Refuse masks that cannot be a heart at end-diastole and end-systole; without masks there is nothing to do.

    Each frame is held to what is drawn of it: some sites draw cavities only, or the myocardium at end-diastole alone.

    Raises:
        Unusable: No phase has a left ventricle, or those that have do not differ; the cavity does not lie in the
            myocardium, the labels spread wider than a heart, or the ejection fraction is impossible.
    """
    if cine.masks is None:
        return
    masks = cine.masks[list(find_frames(cine))]
    walled = [phase for phase in masks if (phase == MYO).any() and (phase == LV).any()]
    if any(myocardium_at_border(phase) < MIN_MYOCARDIUM_AT_BORDER for phase in walled):
        raise Unusable("cavity-outside-myocardium")
    if _extent_mm(masks, cine.spacing_mm) > MAX_EXTENT_MM:
        raise Unusable("labels-too-wide")
    if ejection_fraction(masks) >= MAX_EF:
        raise Unusable("ef-implausible")


def myocardium_at_border(phase: NDArray[np.uint8]) -> float:
    """Share of the pixel edges between the left ventricle's cavity and other labels that lead to myocardium.

    Args:
        phase: Labels of one phase, shape (Z, H, W), with a cavity. What lies outside the image is background.
    """
    padded = np.pad(phase, ((0, 0), (1, 1), (1, 1)))
    cavity = phase == LV
    neighbours = (padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
    edges = sum(np.count_nonzero(cavity & (neighbour != LV)) for neighbour in neighbours)
    return sum(np.count_nonzero(cavity & (neighbour == MYO)) for neighbour in neighbours) / edges


def _extent_mm(masks: NDArray[np.uint8], spacing_mm: tuple[float, float, float]) -> float:
    """Longer side of the rectangle in the plane that holds all labels."""
    rows, columns = np.nonzero(is_heart(masks).any(axis=(0, 1)))
    return max(float(np.ptp(rows) + 1) * spacing_mm[1], float(np.ptp(columns) + 1) * spacing_mm[2])
