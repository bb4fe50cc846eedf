"""Coverage of the network's predictive intervals: the share of patients inside them, against their nominal share."""

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
    """Coverage of the normal intervals predicted +- z sd.

    Args:
        true: Shape (N,), ejection fractions.
        predicted: Shape (N,).
        sd: Shape (N,), predicted standard deviations of the errors. Patients with a value that is not
            finite are left out.

    Returns:
        `n_patients`; `mean_sd_points`; `coverage`, for each nominal share the observed one with its Clopper-Pearson
        interval; `rank_correlation`, Spearman's between sd and absolute error, None where either does not vary. None
        where no patient is left.
    """
    values = np.array([true, predicted, sd], dtype=np.float64)
    truth, guess, predicted_sd = values[:, np.isfinite(values).all(axis=0)]
    num = len(truth)
    if num == 0:
        return None
    error = np.abs(guess - truth)
    rows = []
    for nominal in NOMINAL:
        inside = int((error <= norm.ppf((1 + nominal) / 2) * predicted_sd).sum())
        limits = binomtest(inside, num).proportion_ci(0.95)
        rows.append({"nominal": nominal, "observed": inside / num, "ci95": [float(limits.low), float(limits.high)]})
    varies = num >= MIN_FOR_RANKS and np.ptp(error) > 0 and np.ptp(predicted_sd) > 0
    return {
        "n_patients": num,
        "mean_sd_points": float(POINTS * predicted_sd.mean()),
        "coverage": rows,
        "rank_correlation": float(spearmanr(predicted_sd, error).statistic) if varies else None,
    }
