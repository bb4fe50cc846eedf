"""The ejection fraction of a patient, from the masks of a stack."""

import math

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import ED, ES, LV, NOT_DRAWN

MIN_COVERAGE = 0.5
"""Least share of the slices with a cavity in one phase that a wholly drawn other phase has. Base and apex lose some at
end-systole: 0.67 is the least among 199 ACDC and M&Ms patients."""


def ejection_fraction(masks: NDArray[np.uint8]) -> float:
    """1 - (sum of LV area at ES) / (sum of LV area at ED) over a stack.

    The cavity has to be drawn at both phases, other structures need not be.

    Args:
        masks: Shape (2, Z, H, W), ED then ES.

    Returns:
        NaN where either frame has no LV: a ventricle that was not found at ES has not ejected everything. Likewise
        where nobody drew the cavity of one frame between slices where somebody did, or in most of the other's slices.
    """
    areas = np.count_nonzero(masks == LV, axis=(1, 2, 3))
    if not (areas[ED] and areas[ES]) or _drawn_in_part(masks):
        return math.nan
    return float(1 - areas[ES] / areas[ED])


def _drawn_in_part(masks: NDArray[np.uint8]) -> bool:
    """Whether the cavity of one frame is missing, where it was not drawn, from slices that the other frame shows."""
    cavity = (masks == LV).any(axis=(2, 3))
    missing = (masks == NOT_DRAWN).any(axis=(2, 3)) & ~cavity & cavity[::-1]
    for shown, lacks, other in zip(cavity, missing, cavity[::-1], strict=True):
        first, last = np.flatnonzero(shown)[[0, -1]]
        if lacks[first : last + 1].any() or (lacks.any() and shown.sum() < MIN_COVERAGE * other.sum()):
            return True
    return False
