"""A patient's stack: the slices whose predictions count, and the true ejection fraction."""

import math

from fedcmr.shared.case import Case
from fedcmr.shared.ejection_fraction import ejection_fraction

MIDDLE_SHARE = 0.6


def middle_slices(num_slices: int) -> slice:
    """The middle of a stack by index, in training and testing alike: the central 60 %.

    Basal slices open into the atrium and apical ones blur; which these are must not be read from a mask.
    """
    kept = max(1, round(MIDDLE_SHARE * num_slices))
    first = (num_slices - kept) // 2
    return slice(first, first + kept)


def patient_ef(case: Case) -> float:
    """The true ejection fraction: that of the case's row, else of its masks; NaN where neither is known.

    Masks that a program found are no truth.
    """
    if math.isfinite(case.info.ef) or case.info.contours == "auto":
        return case.info.ef
    return ejection_fraction(case.masks)
