"""Whether the network knows how wrong it is: the share of patients inside its intervals, against the share promised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, spearmanr

from fedcmr.server.evaluation.score import POINTS

NOMINAL = (0.5, 0.68, 0.8, 0.9, 0.95)
MIN_FOR_RANKS = 3


def coverage(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    sd: NDArray[np.floating] | Sequence[float],
) -> dict[str, Any] | None:
    """Normal intervals predicted +- z sd, held against the truth.

    Args:
        true: Shape (N,), ejection fractions.
        predicted: Shape (N,).
        sd: Shape (N,), standard deviations of the errors as the network tells them. Patients with a value that is not
            finite are left out.

    Returns:
        `n_patients`; `mean_sd_points`; `coverage`, for each nominal share the observed one with its Clopper-Pearson
        interval; `rank_correlation`, Spearman's between sd and absolute error, None where either does not vary. None
        where no patient is left.
    """
    values = np.array([true, predicted, sd], dtype=np.float64)
    truth, guess, told = values[:, np.isfinite(values).all(axis=0)]
    num = len(truth)
    if num == 0:
        return None
    error = np.abs(guess - truth)
    rows = []
    for nominal in NOMINAL:
        inside = int((error <= norm.ppf((1 + nominal) / 2) * told).sum())
        limits = binomtest(inside, num).proportion_ci(0.95)
        rows.append({"nominal": nominal, "observed": inside / num, "ci95": [float(limits.low), float(limits.high)]})
    varies = num >= MIN_FOR_RANKS and np.ptp(error) > 0 and np.ptp(told) > 0
    return {
        "n_patients": num,
        "mean_sd_points": float(POINTS * told.mean()),
        "coverage": rows,
        "rank_correlation": float(spearmanr(told, error).statistic) if varies else None,
    }
