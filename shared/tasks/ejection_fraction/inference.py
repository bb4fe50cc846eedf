"""From slices to a patient: the ejection fraction of a whole stack, and its predictive uncertainty.

There are two ways. The network predicts the patient's ejection fraction from each slice of the middle, and the result
is the mean; or it predicts the cavity's areas, which are summed over the stack as clinicians do. The second sees what
the middle does not show, but depends on where borders are drawn, which generated hearts show less well than patients'
scans: `regression.area_share` says how much of the result is the second, by default nothing (CHANGELOG has the
figures). Each way is repeated with the images rotated; the spread of these predictions gives the predicted SD.
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
"""As a fraction of the image, summed over a stack: less than half a pixel is no cavity."""


class Predictions(NamedTuple):
    """Predictions for N patients.

    Attributes:
        ef: Shape (N,), ejection fraction in [0, 1].
        sd: Shape (N,), predicted standard deviation of its error, from the spread over rotations and from the errors on
            the patients that the network was calibrated on; NaN for a network that was not.
    """

    ef: NDArray[np.float64]
    sd: NDArray[np.float64]


def predict(model: Regressor, cases: Sequence[Case], num_tta: int, device: str | torch.device = "cpu") -> Predictions:
    """Predict from every patient's stack, `num_tta` times each way.

    Args:
        model: Left in evaluation mode.
        cases: Patients of any number of slices; only their pixels are used.
        num_tta: Rotations averaged, from -20 to 20 degrees.
        device: Where to compute.
    """
    rotated = stack_predictions(model, cases, num_tta, device)
    floor, gain = model.sd_floor.item(), model.sd_gain.item()
    return Predictions(rotated.mean(axis=1), np.sqrt(floor**2 + (gain * rotated.std(axis=1)) ** 2))


@torch.inference_mode()
def stack_predictions(
    model: Regressor, cases: Sequence[Case], num_tta: int, device: str | torch.device = "cpu"
) -> NDArray[np.float64]:
    """Every patient's prediction under each rotation.

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
    predictions = []
    for angle in torch.linspace(-limit, limit, num_tta):
        slices = [values.split(sizes) for values in _predict_slices(model, images, angle, device)]
        patients = zip(middles, *slices, strict=True)
        predictions.append([of_stack(Prediction(*values), middle, share) for middle, *values in patients])
    return np.array(predictions).T


def of_stack(slices: Prediction, middle: slice, area_share: float) -> float:
    """One patient's ejection fraction.

    Args:
        slices: What the network predicts for each slice, base to apex or the other way round, shapes (Z,).
        middle: The slices whose own predictions count.
        area_share: Share of the result that comes from the areas, in [0, 1].
    """
    by_slices = slices.ef[middle].double().mean()
    ed, es = slices.area_ed.double().sum(), slices.area_es.double().sum()
    by_areas = (1 - es / ed.clamp(min=MIN_AREA)).clamp(0, 1)
    return torch.lerp(by_slices, by_areas, area_share).item()


def _predict_slices(model: Regressor, images: Tensor, angle: Tensor, device: str | torch.device) -> Prediction:
    """What the network predicts for every slice, rotated by `angle` radians; shapes (M,), on the CPU."""
    parts = []
    for batch in images.split(PREDICT_BATCH):
        num, ones = len(batch), torch.ones(len(batch), 2)
        rotated = warp(batch, angle.expand(num), ones[:, 0], torch.zeros(num, 2), ones).to(device)
        parts.append([values.cpu() for values in model(rotated)])
    return Prediction(*(torch.cat(values) for values in zip(*parts, strict=True)))
