"""From slices to a patient: the ejection fraction of a whole stack, and how sure the network is of it.

Clinicians sum the cavity's areas over the stack; so does the first of two answers, with the areas that the network
reads. The second is the mean of the ejection fractions that it tells from the middle slices alone. Their errors have
different causes (borders; what a slice cannot know of its stack), so a patient's answer is the mean of both. Each is
asked again with the pictures turned; how far all these answers lie apart tells how sure the patient's is.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from server.augmentation import warp
from server.localisation import centred
from server.regression import Prediction, Regressor, middle_slices, patient_ef, train_regressor
from shared.case import Case
from shared.config import RegressionConfig
from shared.views import slice_pairs

TTA_ROTATION_DEG = 20.0
PREDICT_BATCH = 64
MIN_AREA = 1e-4
"""Of the picture, summed over a stack: less than half a pixel is no cavity."""
MIN_SD = 0.005
"""Half a point: no reading is surer than the masks are drawn."""
MIN_TO_HOLD_OUT, HELD_OUT_SHARE = 100, 0.1
"""From so many patients on, this share of them is kept from the training to calibrate the network on."""


class Readings(NamedTuple):
    """Answers for N patients.

    Attributes:
        ef: Shape (N,), ejection fraction in [0, 1].
        sd: Shape (N,), standard deviation of its error, by the spread of the answers and by how far such answers were
            wrong on the patients that the network was calibrated on; NaN for a network that was not.
    """

    ef: NDArray[np.float64]
    sd: NDArray[np.float64]


def train_reader(
    cases: Sequence[Case], config: RegressionConfig, seed: int, device: str | torch.device = "cpu", **options: Any
) -> Regressor:
    """Train a ResNet50 and calibrate how sure it is.

    Held-out patients calibrate it where there are enough. Fewer than 100 train all and calibrate on themselves, which
    makes the network too sure of itself.

    Args:
        cases: As for `train_regressor`.
        config: See there.
        seed: Of the training and of who is held out.
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
    judged = held_out or training
    calibrate(model, judged, [patient_ef(case) for case in judged], config.num_tta, device)
    return model


def predict(model: Regressor, cases: Sequence[Case], num_tta: int, device: str | torch.device = "cpu") -> Readings:
    """Read every patient's stack, `num_tta` times each way.

    Args:
        model: Left in evaluation mode.
        cases: Patients of any number of slices; only their pixels are used.
        num_tta: Rotations averaged, from -20 to 20 degrees.
        device: Where to compute.
    """
    answers = stack_answers(model, cases, num_tta, device)
    floor, gain = model.sd_floor.item(), model.sd_gain.item()
    return Readings(answers.mean(axis=1), np.sqrt(floor**2 + (gain * answers.std(axis=1)) ** 2))


@torch.inference_mode()
def stack_answers(
    model: Regressor, cases: Sequence[Case], num_tta: int, device: str | torch.device = "cpu"
) -> NDArray[np.float64]:
    """All answers for every patient.

    Returns:
        Shape (N, 2 * num_tta): by areas and by the middle slices, for each rotation.
    """
    if not cases:
        return np.zeros((0, 2 * num_tta))
    stacks = centred([slice_pairs(case)[0] for case in cases])
    limit = math.radians(TTA_ROTATION_DEG) if num_tta > 1 else 0.0
    model.to(device).eval()
    answers = []
    for angle in torch.linspace(-limit, limit, num_tta):
        slices = _read(model, torch.cat(stacks), angle, device)
        parts = zip(*(values.split([len(stack) for stack in stacks]) for values in slices), strict=True)
        answers += np.array([of_stack(Prediction(*part)) for part in parts]).T.tolist()
    return np.array(answers).T


def of_stack(slices: Prediction) -> tuple[float, float]:
    """One patient's ejection fraction by areas summed over the stack, and by the mean of the middle slices' answers.

    Args:
        slices: What the network says of each slice, base to apex or the other way round, shapes (Z,).
    """
    ed, es = slices.area_ed.double().sum(), slices.area_es.double().sum()
    by_areas = (1 - es / ed.clamp(min=MIN_AREA)).clamp(0, 1)
    by_slices = slices.ef[middle_slices(len(slices.ef))].double().mean()
    return by_areas.item(), by_slices.item()


def calibrate(
    model: Regressor, cases: Sequence[Case], true: Sequence[float], num_tta: int, device: str | torch.device = "cpu"
) -> None:
    """Set `sd_floor` and `sd_gain`, the likeliest under normal errors: variance = floor^2 + (gain x spread)^2.

    Args:
        model: Whose numbers are set.
        cases: Patients of the kind it was trained on, better none that it was trained on.
        true: Shape (len(cases),), their ejection fractions.
        num_tta: As it will be asked later, because the spread depends on it.
        device: Where to compute.
    """
    answers = stack_answers(model, cases, num_tta, device)
    error, spread = answers.mean(axis=1) - np.asarray(true), answers.std(axis=1)

    def minus_log_likelihood(logs: NDArray[np.float64]) -> float:
        floor, gain = np.exp(logs)
        variance = (MIN_SD + floor) ** 2 + (gain * spread) ** 2
        return float(np.mean(np.log(variance) + error**2 / variance))

    start = np.log([max(error.std(), 1e-3), 1.0])
    floor, gain = np.exp(minimize(minus_log_likelihood, start, method="Nelder-Mead").x)
    model.sd_floor.fill_(MIN_SD + floor)
    model.sd_gain.fill_(gain)


def _read(model: Regressor, images: Tensor, angle: Tensor, device: str | torch.device) -> Prediction:
    """What the network says of every slice, turned by `angle` radians; shapes (M,), on the CPU."""
    read = []
    for batch in images.split(PREDICT_BATCH):
        num, ones = len(batch), torch.ones(len(batch), 2)
        turned = warp(batch, angle.expand(num), ones[:, 0], torch.zeros(num, 2), ones).to(device)
        read.append([values.cpu() for values in model(turned)])
    return Prediction(*(torch.cat(values) for values in zip(*read, strict=True)))
