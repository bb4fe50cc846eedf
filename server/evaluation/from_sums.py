"""Figures of a model from the sites' sums over their own patients, with intervals that include the noise in the sums.

Everything in this file is post-processing of the sites' releases and costs no privacy.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.evaluation.score import FEW_PATIENTS, POINTS
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP

Z95 = 1.959964
SWAMPED_POINTS = 5.0
"""A figure in EF points is unknown where noise alone moves it by more than this (95 %): between readers it is 4."""
SWAMPED_MSE = 0.01
"""The same half-width for the mean squared error: (10 EF points) squared."""
SWAMPED_R2 = 0.5
UNITS = {
    "mae_points": (POINTS, SWAMPED_POINTS),
    "bias_points": (POINTS, SWAMPED_POINTS),
    "mse": (1.0, SWAMPED_MSE),
    "r2": (1.0, SWAMPED_R2),
}
"""For each figure the factor from fractions to its unit, and the half-width of noise from which it is unknown."""
BOUNDS = {"mae_points": (0, math.inf), "bias_points": (-math.inf, math.inf), "mse": (0, math.inf), "r2": (-math.inf, 1)}
"""Range of each figure; noise may take it, or its interval, beyond."""
FIGURES = ("mae_points", "bias_points", "mse", "r2")


def figures(sums: NDArray[np.float64], noise: NDArray[np.float64]) -> dict[str, Any]:
    """The figures of one group of patients.

    Each follows from the sums by a smooth formula. Its interval adds two variances: that of the noise, by the formula's
    gradient (the delta method), and that of drawing other patients of the same kind, which the sums give for the mean
    error and the mean absolute error, and which is a normal approximation for the two others.

    Args:
        sums: Shape (6,), those of `fedcmr.shared.tasks.ejection_fraction.sums.SUMS`, noise included.
        noise: Shape (6, 6), covariance of the noise in them; zeros where there is none.

    Returns:
        `n_patients`, a whole number, None where noise swamps it; each of `FIGURES`, None where noise swamps it or the
        patients are too few; `ci95`, an interval for each figure, and `noise_sd`, what noise alone contributes to it,
        in the figure's unit; None where the figure is None.
    """
    count_sd = math.sqrt(noise[0, 0])
    unknown: dict[str, Any] = dict.fromkeys(FIGURES)
    empty = {"n_patients": None, **unknown, "ci95": dict(unknown), "noise_sd": dict(unknown)}
    # A mean has no meaning if the count may be nearly zero.
    if sums[0] - Z95 * count_sd < max(1.0, sums[0] / 2) or sums[0] < MIN_GROUP:
        return empty
    result = {**empty, "n_patients": round(float(sums[0]))}
    for name, formula in formulas(sums, noise).items():
        unit, limit = UNITS[name]
        if formula is None or (name == "r2" and sums[0] < FEW_PATIENTS):
            continue
        value, gradient, variance = formula
        noise_sd = unit * math.sqrt(max(float(gradient @ noise @ gradient), 0.0))
        if not Z95 * noise_sd <= limit:
            continue
        half = Z95 * math.hypot(noise_sd, unit * math.sqrt(max(variance, 0.0)))
        figure, low, high = np.clip([unit * value, unit * value - half, unit * value + half], *BOUNDS[name]).tolist()
        result[name] = figure
        result["ci95"][name] = [low, high]
        result["noise_sd"][name] = noise_sd
    return result


def formulas(sums: NDArray[np.float64], noise: NDArray[np.float64]) -> dict[str, "Formula | None"]:
    """The formula of each of `FIGURES` at these sums, errors as fractions; None where it has no value."""
    squares = sums[3] + math.sqrt(noise[3, 3])
    return {
        "mae_points": _mean(sums, 2, squares),
        "bias_points": _mean(sums, 1, squares),
        "mse": _mean_square(sums),
        "r2": _r2(sums),
    }


Formula = tuple[float, NDArray[np.float64], float]
"""Value, its gradient in the sums, and the variance of drawing other patients."""


def _mean(sums: NDArray[np.float64], index: int, squares: float) -> Formula:
    """A mean of errors; the sum of their squares gives their variance.

    The sum of squares is taken larger by one standard deviation of its noise, so that noise does not make the interval
    too narrow.
    """
    count, total = sums[0], sums[index]
    value = total / count
    gradient = np.zeros(len(sums))
    gradient[index], gradient[0] = 1 / count, -total / count**2
    return value, gradient, max(squares / count - value**2, 0.0) / (count - 1)


def _mean_square(sums: NDArray[np.float64]) -> Formula:
    """The mean of squared errors; for normal errors around zero its variance is 2 mse^2 / n."""
    count, total = sums[0], sums[3]
    value = total / count
    gradient = np.zeros(len(sums))
    gradient[3], gradient[0] = 1 / count, -total / count**2
    return value, gradient, 2 * value**2 / count


def _r2(sums: NDArray[np.float64]) -> Formula | None:
    """1 - squared errors / squared deviations of the truth; None where noise leaves no such deviations.

    The variance is that of the quotient of two independent sums of squares of normal variables.
    """
    count, _, _, squares, ef, squared_ef = sums
    spread = squared_ef - ef**2 / count
    if spread <= 0:
        return None
    ratio = squares / spread
    by_spread = squares / spread**2
    gradient = np.array([by_spread * ef**2 / count**2, 0, 0, -1 / spread, -2 * by_spread * ef / count, by_spread])
    return 1 - ratio, gradient, ratio**2 * (2 / count + 2 / (count - 1))
