"""Predicted against true ejection fraction: figures with bootstrap intervals, per vendor and over all.

Ejection fractions are fractions in [0, 1]; differences that people read are in EF points (hundredths). What cannot
be computed is None, never NaN: one patient has no r2, a constant prediction has no correlation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

METRICS = ("mse", "r2", "mae_points", "r", "bias_points", "loa_low_points", "loa_high_points")
"""Mean squared error, coefficient of determination, mean absolute error, Pearson's r, mean of predicted - true, and
Bland & Altman's (1986) limits of agreement, bias +- 1.96 standard deviations."""
POINTS = 100.0
NO_SPREAD = 1e-12
"""Variances below this are rounding: constant values of which no correlation can be told."""
CONFIDENCE = (2.5, 97.5)
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
        predicted: Shape (N,).
        num_bootstrap: Number of resamples.
        seed: Of the resampling.

    Returns:
        `n_patients`, `METRICS` (None where undefined; all None if a prediction is not finite), and `ci95` with
        [low, high] or None for each.
    """
    truth, guess = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if truth.shape != guess.shape or truth.ndim != 1:
        raise ValueError(f"Expected two vectors of one length, got shapes {truth.shape} and {guess.shape}.")
    known = np.isfinite(truth)
    truth, guess = truth[known], guess[known]
    num = len(truth)
    if num == 0 or not np.isfinite(guess).all():
        return {"n_patients": num, **dict.fromkeys(METRICS), "ci95": dict.fromkeys(METRICS)}

    whole = _metrics(truth, guess, np.ones((1, num)))[0]
    intervals: dict[str, list[float] | None] = dict.fromkeys(METRICS)
    if num > 1:
        rng = np.random.default_rng(seed)
        chunk = max(1, CHUNK_ELEMENTS // num)
        sizes = [min(chunk, num_bootstrap - start) for start in range(0, num_bootstrap, chunk)]
        weights = (rng.multinomial(num, np.full(num, 1 / num), size=size) for size in sizes)
        resampled = np.concatenate([_metrics(truth, guess, weight) for weight in weights])
        for name, values, defined in zip(METRICS, resampled.T, np.isfinite(whole), strict=True):
            finite = values[np.isfinite(values)]
            if defined and len(finite) > num_bootstrap // 2:
                intervals[name] = [float(limit) for limit in np.percentile(finite, CONFIDENCE)]
    values = {name: _number(value) for name, value in zip(METRICS, whole, strict=True)}
    return {"n_patients": num, **values, "ci95": intervals}


def table(
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    vendors: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> dict[str, Score]:
    """`score` of each vendor's patients, in alphabetical order, then of "all"."""
    truth, guess, names = np.asarray(true), np.asarray(predicted), np.asarray(vendors)
    if not len(truth) == len(guess) == len(names):
        raise ValueError(f"Expected equal lengths, got {len(truth)}, {len(guess)} and {len(names)} vendors.")
    rows = {
        str(name): score(truth[names == name], guess[names == name], num_bootstrap, seed) for name in np.unique(names)
    }
    return {**rows, "all": score(truth, guess, num_bootstrap, seed)}


def predict_the_mean(training_efs: Sequence[float], num_patients: int) -> NDArray[np.float64]:
    """The baseline that looks at no picture: the mean ejection fraction of the training labels for everybody."""
    return np.full(num_patients, float(np.mean(training_efs)))


def as_text_table(title: str, rows: Mapping[str, Mapping[str, Score]]) -> Table:
    """Scores for the terminal, 95 % intervals in brackets.

    Args:
        title: What stands above.
        rows: {model or test set: what `table` returned}.
    """
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "vendor"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("n", "MAE, EF points", "r2", "bias", "MSE"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, scores in rows.items():
        for vendor, values in scores.items():
            label = name if vendor == next(iter(scores)) else ""
            mae, r2 = _cell(values, "mae_points", 1, interval=True), _cell(values, "r2", 2, interval=True)
            bias, mse = _cell(values, "bias_points", 1), _cell(values, "mse", 4)
            shown.add_row(label, vendor, str(values["n_patients"]), mae, r2, bias, mse)
        shown.add_row()
    return shown


def _metrics(truth: NDArray[np.float64], guess: NDArray[np.float64], weights: NDArray[Any]) -> NDArray[np.float64]:
    """`METRICS` of every weighting of the patients, shape (B, len(METRICS)), NaN where undefined.

    All are functions of weighted sums, so B resamples cost one matrix product. Values are centred on the mean truth
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
    return np.stack([mse, r2, *points], axis=1)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(values: Score, metric: str, digits: int, interval: bool = False) -> str:
    """A figure, with its interval on request; a dash where it is undefined."""
    if values[metric] is None:
        return "-"
    limits = values["ci95"][metric] if interval else None
    shown = f" [{limits[0]:.{digits}f}, {limits[1]:.{digits}f}]" if limits else ""
    return f"{values[metric]:.{digits}f}{shown}"
