"""From slices to a patient: the ejection fraction of a whole stack, and how sure the network is of it.

There are two ways. The network tells the patient's ejection fraction from each slice of the middle, and the answer is
the mean; or it reads the cavity's areas, which are summed over the stack as clinicians do. The second sees what the
middle does not tell, but leans on where borders are drawn, which painted hearts know less well than patients' scans:
`regression.area_share` says how much of the answer is the second, by default nothing (CHANGELOG has the figures).
Each way is asked again with the pictures turned; how far these answers lie apart tells how sure the patient's is.
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
from server.examples import middle_slices, patient_ef
from server.localisation import centred
from server.regression import Prediction, Regressor, train_regressor
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
    """Every patient's answer under each rotation.

    Returns:
        Shape (N, num_tta).
    """
    if not cases:
        return np.zeros((0, num_tta))
    stacks = [slice_pairs(case)[0] for case in cases]
    share = model.area_share.item()
    middles = [middle_slices(len(stack)) for stack in stacks]
    if share == 0:
        stacks = [stack[middle] for stack, middle in zip(stacks, middles, strict=True)]
        middles = [slice(None)] * len(stacks)
    stacks = centred(stacks)
    images, sizes = torch.cat(stacks), [len(stack) for stack in stacks]
    limit = math.radians(TTA_ROTATION_DEG) if num_tta > 1 else 0.0
    model.to(device).eval()
    answers = []
    for angle in torch.linspace(-limit, limit, num_tta):
        read = [values.split(sizes) for values in _read(model, images, angle, device)]
        patients = zip(middles, *read, strict=True)
        answers.append([of_stack(Prediction(*slices), middle, share) for middle, *slices in patients])
    return np.array(answers).T


def of_stack(slices: Prediction, middle: slice, area_share: float) -> float:
    """One patient's ejection fraction.

    Args:
        slices: What the network says of each slice, base to apex or the other way round, shapes (Z,).
        middle: The slices whose own answers count.
        area_share: Share of the answer that comes from the areas, in [0, 1].
    """
    by_slices = slices.ef[middle].double().mean()
    ed, es = slices.area_ed.double().sum(), slices.area_es.double().sum()
    by_areas = (1 - es / ed.clamp(min=MIN_AREA)).clamp(0, 1)
    return torch.lerp(by_slices, by_areas, area_share).item()


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
