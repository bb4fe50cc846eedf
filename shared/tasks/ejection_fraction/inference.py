"""From slices to a patient: the ejection fraction of a whole stack, and how sure the network is of it.

There are two ways. The network tells the patient's ejection fraction from each slice of the middle, and the answer is
the mean; or it reads the cavity's areas, which are summed over the stack as clinicians do. The second sees what the
middle does not tell, but leans on where borders are drawn, which painted hearts know less well than patients' scans:
`regression.area_share` says how much of the answer is the second, by default nothing (CHANGELOG has the figures).
Each way is asked again with the pictures turned; how far these answers lie apart tells how sure the patient's is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcmr.shared.case import Case
from fedcmr.shared.tasks.ejection_fraction.centring import centred
from fedcmr.shared.tasks.ejection_fraction.network import Prediction, Regressor
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices
from fedcmr.shared.views import slice_pairs, warp

TTA_ROTATION_DEG = 20.0
PREDICT_BATCH = 64
MIN_AREA = 1e-4
"""Of the picture, summed over a stack: less than half a pixel is no cavity."""


class Predictions(NamedTuple):
    """Answers for N patients.

    Attributes:
        ef: Shape (N,), ejection fraction in [0, 1].
        sd: Shape (N,), standard deviation of its error, by the spread of the answers and by how far such answers were
            wrong on the patients that the network was calibrated on; NaN for a network that was not.
    """

    ef: NDArray[np.float64]
    sd: NDArray[np.float64]


def predict(model: Regressor, cases: Sequence[Case], num_tta: int, device: str | torch.device = "cpu") -> Predictions:
    """Read every patient's stack, `num_tta` times each way.

    Args:
        model: Left in evaluation mode.
        cases: Patients of any number of slices; only their pixels are used.
        num_tta: Rotations averaged, from -20 to 20 degrees.
        device: Where to compute.
    """
    answers = stack_predictions(model, cases, num_tta, device)
    floor, gain = model.sd_floor.item(), model.sd_gain.item()
    return Predictions(answers.mean(axis=1), np.sqrt(floor**2 + (gain * answers.std(axis=1)) ** 2))


@torch.inference_mode()
def stack_predictions(
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


def _read(model: Regressor, images: Tensor, angle: Tensor, device: str | torch.device) -> Prediction:
    """What the network says of every slice, turned by `angle` radians; shapes (M,), on the CPU."""
    read = []
    for batch in images.split(PREDICT_BATCH):
        num, ones = len(batch), torch.ones(len(batch), 2)
        turned = warp(batch, angle.expand(num), ones[:, 0], torch.zeros(num, 2), ones).to(device)
        read.append([values.cpu() for values in model(turned)])
    return Prediction(*(torch.cat(values) for values in zip(*read, strict=True)))
