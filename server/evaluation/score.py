"""Predicted against true ejection fraction: the figures of one group of patients, with bootstrap intervals.

Ejection fractions are fractions in [0, 1]; differences that people read are in EF points (hundredths). What cannot
be computed is None, never NaN: one patient has no r2, a constant prediction has no correlation, equal truths have
neither. A prediction that is not finite leaves a marked gap: no figure of its group is given, `n_undefined` says why.

Where one model was trained under S seeds, its predictions have shape (S, N): a figure is then the mean of the S
models' figures, and a resample draws the same patients for all of them. Such an interval covers what other patients
would change, not what other seeds would.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.evaluation.categories import category_figures

METRICS = (
    "mse",
    "r2",
    "mae_points",
    "r",
    "bias_points",
    "loa_low_points",
    "loa_high_points",
    "category_agreement",
    "category_kappa",
)
"""Mean squared error, coefficient of determination, mean absolute error, Pearson's r, mean of predicted - true, Bland &
Altman's (1986) limits of agreement, bias +- 1.96 standard deviations, and of the classes of `categories` the share of
patients in the right one and Cohen's linearly weighted kappa."""
POINTS = 100.0
NO_SPREAD = 1e-12
"""Variances below this are rounding: constant values which have no correlation."""
CONFIDENCE = (2.5, 97.5)
FEW_PATIENTS = 10
"""Below this a row of a table is an illustration, and whoever shows it says so."""
CHUNK_ELEMENTS = 10_000_000

Score = dict[str, Any]


def score(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    num_bootstrap: int,
    seed: int,
) -> Score:
    """All figures of one test set, with 95 % percentile intervals over resampled patients.

    Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 13. A metric that is undefined in a resample
    (all patients alike) is left out of its interval.

    Args:
        true: Shape (N,), measured ejection fractions; NaN where unknown, these patients are left out.
        predicted: Shape (N,), or (S, N) of S seeds.
        num_bootstrap: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        `n_patients`; `n_undefined`, those of them with a prediction (of any seed) that is not finite; `METRICS` (None
        where undefined; all None if `n_undefined` is not 0), and `ci95` with [low, high] or None for each.
    """
    truth, guesses = _known(true, predicted)
    num, num_undefined = len(truth), int((~np.isfinite(guesses)).any(axis=0).sum())
    counts = {"n_patients": num, "n_undefined": num_undefined}
    if num == 0 or num_undefined:
        return {**counts, **dict.fromkeys(METRICS), "ci95": dict.fromkeys(METRICS)}

    def figures(weights: NDArray[Any]) -> NDArray[np.float64]:
        return np.mean([_metrics(truth, guess, weights) for guess in guesses], axis=0)

    whole = figures(np.ones((1, num)))[0]
    intervals: dict[str, list[float] | None] = dict.fromkeys(METRICS)
    if num > 1:
        resampled = np.concatenate([figures(weights) for weights in _resamples(num, num_bootstrap, seed)])
        for name, values, defined in zip(METRICS, resampled.T, np.isfinite(whole), strict=True):
            finite = values[np.isfinite(values)]
            if defined and len(finite) > num_bootstrap // 2:
                intervals[name] = [float(limit) for limit in np.percentile(finite, CONFIDENCE)]
    values = {name: _number(value) for name, value in zip(METRICS, whole, strict=True)}
    return {**counts, **values, "ci95": intervals}


def paired_difference(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    other: NDArray[np.floating] | Sequence[float],
    num_bootstrap: int,
    seed: int,
) -> Score:
    """How much larger one model's mean absolute error is than another's on the same patients, in EF points.

    The two errors are subtracted patient by patient before anything is averaged or resampled, so that what makes a
    patient hard for both models does not widen the interval, as it does that of either model's own error.

    Args:
        true: As in `score`.
        predicted: Predictions of the one model, as in `score`.
        other: Predictions of the other, which may have another number of seeds.
        num_bootstrap: Number of resamples.
        seed: Seed of the resampling; the same patients as `score` draws with it.

    Returns:
        `n_patients`; `n_undefined`, those of them with a prediction of either model that is not finite;
        `difference_points`, below 0 where the first model is the better one, None where there is such a prediction or
        no patient; `ci95`, [low, high], None where that is or there is one patient only.
    """
    truth, guesses = _known(true, predicted)
    _, others = _known(true, other)
    num = len(truth)
    differences = POINTS * (np.abs(guesses - truth).mean(axis=0) - np.abs(others - truth).mean(axis=0))
    counts = {"n_patients": num, "n_undefined": int((~np.isfinite(differences)).sum())}
    if num == 0 or counts["n_undefined"]:
        return {**counts, "difference_points": None, "ci95": None}
    interval = mean_interval(differences, num_bootstrap, seed)
    return {**counts, "difference_points": float(differences.mean()), "ci95": interval}


def mean_interval(values: NDArray[np.floating], num_bootstrap: int, seed: int) -> list[float] | None:
    """95 % percentile interval of the mean of one finite value per patient, [low, high]; None below two patients."""
    num = len(values)
    if num < 2:
        return None
    resampled = np.concatenate([weights @ values / num for weights in _resamples(num, num_bootstrap, seed)])
    return [float(limit) for limit in np.percentile(resampled, CONFIDENCE)]


def _known(
    true: NDArray[np.floating] | Sequence[float], predicted: NDArray[np.floating] | Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The patients of known truth: their truths, shape (N,), and predictions, shape (S, N)."""
    truth, guesses = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.ndim != 1 or guesses.ndim not in (1, 2) or guesses.shape[-1:] != truth.shape:
        raise ValueError(f"Expected shapes (N,) and (N,) or (S, N), got {truth.shape} and {guesses.shape}.")
    known = np.isfinite(truth)
    return truth[known], np.atleast_2d(guesses)[:, known]


def _resamples(num: int, num_bootstrap: int, seed: int) -> Iterator[NDArray[Any]]:
    """How often each of `num` patients is drawn in each resample, shape (B, num), in chunks that fit in memory."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // num)
    for start in range(0, num_bootstrap, chunk):
        yield rng.multinomial(num, np.full(num, 1 / num), size=min(chunk, num_bootstrap - start))


def _metrics(truth: NDArray[np.float64], guess: NDArray[np.float64], weights: NDArray[Any]) -> NDArray[np.float64]:
    """`METRICS` of every weighting of the patients, shape (B, len(METRICS)), NaN where undefined.

    All are functions of weighted sums, so B resamples cost two matrix products. Values are centred on the mean truth
    first, or the difference of large sums would lose digits.

    Args:
        truth: Shape (N,).
        guess: Shape (N,).
        weights: Shape (B, N), how often each patient was drawn; rows sum to N.
    """
    num = len(truth)
    t, p = truth - truth.mean(), guess - truth.mean()
    error = p - t
    sums = weights @ np.stack([t, p, t * t, p * p, t * p, error, error**2, np.abs(error)], axis=1) / num
    mean_t, mean_p, mean_tt, mean_pp, mean_tp, bias, mse, mae = sums.T
    var_t, var_p = mean_tt - mean_t**2, mean_pp - mean_p**2
    with np.errstate(divide="ignore", invalid="ignore"):
        r2 = np.where(var_t > NO_SPREAD, 1 - mse / var_t, np.nan)
        spread = (var_t > NO_SPREAD) & (var_p > NO_SPREAD)
        r = np.where(spread, (mean_tp - mean_t * mean_p) / np.sqrt(var_t * var_p), np.nan)
        variance = np.maximum(mse - bias**2, 0) * num / (num - 1) if num > 1 else np.full_like(mse, np.nan)
    half = 1.96 * np.sqrt(variance)
    points = (POINTS * mae, np.clip(r, -1, 1), POINTS * bias, POINTS * (bias - half), POINTS * (bias + half))
    return np.stack([mse, r2, *points, *category_figures(truth, guess, weights)], axis=1)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
