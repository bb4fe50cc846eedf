"""Training and calibration of a ResNet50 that also predicts the uncertainty of each patient's ejection fraction."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from fedcmr.server.settings import RegressionConfig
from fedcmr.server.tasks.ejection_fraction.training import train_regressor
from fedcmr.shared.case import Case
from fedcmr.shared.tasks.ejection_fraction.inference import stack_predictions
from fedcmr.shared.tasks.ejection_fraction.network import Regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

MIN_SD = 0.005
"""Half an EF point: no prediction is more certain than the masks are."""
MIN_TO_HOLD_OUT, HELD_OUT_SHARE = 100, 0.1
"""Least number of patients from which a share is held out for calibration, and this share."""


def train_calibrated(
    cases: Sequence[Case], config: RegressionConfig, seed: int, device: str | torch.device = "cpu", **options: Any
) -> Regressor:
    """Train a ResNet50 and calibrate its predictive uncertainty.

    Held-out patients calibrate it where there are enough. Fewer than 100 train all and calibrate on themselves, which
    makes the predicted SD too small.

    Args:
        cases: As for `train_regressor`.
        config: See there.
        seed: Seed of the training and of who is held out.
        device: Where to train.
        **options: What else `train_regressor` takes.

    Raises:
        UserError: See there.
    """
    known = [case for case in cases if math.isfinite(patient_ef(case))]
    order = np.random.default_rng(seed).permutation(len(known))
    num = round(HELD_OUT_SHARE * len(known)) if len(known) >= MIN_TO_HOLD_OUT else 0
    held_out = [known[i] for i in sorted(order[:num])]
    training = [known[i] for i in sorted(order[num:])] or list(cases)
    model = train_regressor(training, config, seed, device, **options)
    calibration_cases = held_out or training
    true = [patient_ef(case) for case in calibration_cases]
    calibrate(model, calibration_cases, true, config.num_tta, device)
    return model


def calibrate(
    model: Regressor, cases: Sequence[Case], true: Sequence[float], num_tta: int, device: str | torch.device = "cpu"
) -> None:
    """Set `sd_floor` and `sd_gain`, the likeliest under normal errors: variance = floor^2 + (gain x spread)^2.

    Args:
        model: Its `sd_floor` and `sd_gain` are set.
        cases: Patients of the kind it was trained on, preferably not the training patients themselves.
        true: Shape (len(cases),), their ejection fractions.
        num_tta: Number of rotations averaged, as in later inference, because the spread depends on it.
        device: Where to compute.
    """
    predictions = stack_predictions(model, cases, num_tta, device)
    error, spread = predictions.mean(axis=1) - np.asarray(true), predictions.std(axis=1)

    def minus_log_likelihood(logs: NDArray[np.float64]) -> float:
        floor, gain = np.exp(logs)
        variance = (MIN_SD + floor) ** 2 + (gain * spread) ** 2
        return float(np.mean(np.log(variance) + error**2 / variance))

    start = np.log([max(error.std(), 1e-3), 1.0])
    floor, gain = np.exp(minimize(minus_log_likelihood, start, method="Nelder-Mead").x)
    model.sd_floor.fill_(MIN_SD + floor)
    model.sd_gain.fill_(gain)
