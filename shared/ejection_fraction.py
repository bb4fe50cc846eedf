"""The ejection fraction of a patient, from the masks of a stack."""

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import ED, ES, LV


def ejection_fraction(masks: NDArray[np.uint8]) -> float:
    """1 - (sum of LV area at ES) / (sum of LV area at ED) over a stack.

    Args:
        masks: Shape (2, Z, H, W), ED then ES.

    Returns:
        NaN where there is no LV at ED.
    """
    areas = (masks == LV).reshape(2, -1).sum(axis=1)
    return float(1 - areas[ES] / areas[ED]) if areas[ED] else float("nan")
