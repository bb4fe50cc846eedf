"""The ejection fraction of a patient, from the masks of a stack."""

import math

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import ED, ES, LV


def ejection_fraction(masks: NDArray[np.uint8]) -> float:
    """1 - (sum of LV area at ES) / (sum of LV area at ED) over a stack.

    Args:
        masks: Shape (2, Z, H, W), ED then ES.

    Returns:
        NaN where either frame has no LV: a ventricle that was not found at ES has not ejected everything.
    """
    areas = np.count_nonzero(masks == LV, axis=(1, 2, 3))
    return float(1 - areas[ES] / areas[ED]) if areas[ED] and areas[ES] else math.nan
