"""Training examples of the ResNet50: slice pairs of many patients, centred on the ventricle, with their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcmr.shared.case import LV, NOT_DRAWN, Case
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.centring import centred
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices, patient_ef
from fedcmr.shared.views import slice_pairs


@dataclass(frozen=True)
class Examples:
    """Slice pairs of many patients with their targets, as tensors.

    Attributes:
        images: Shape (M, 2, H, W), float32 in [-1, 1].
        ef: Shape (M,), the patient's ejection fraction; NaN in slices outside the middle, which do not predict it.
        areas: Shape (M, 2), LV area at ED and ES as a fraction of the image; NaN where the patient has no mask,
            and where nobody drew the cavity.
        mean_ef: Mean over patients, not over slices.
    """

    images: Tensor
    ef: Tensor
    areas: Tensor
    mean_ef: float


def prepare_examples(cases: Sequence[Case], whole_stacks: bool = False) -> Examples:
    """The middle slices of every patient whose ejection fraction is known, or all of them for their areas.

    Raises:
        UserError: There is no such patient.
    """
    known = [(case, patient_ef(case)) for case in cases]
    known = [(case, ef) for case, ef in known if math.isfinite(ef)]
    if not known:
        raise UserError(f"none of the {len(cases)} training cases has an ejection fraction: give labels or masks")
    stacks, efs, areas = [], [], []
    for case, ef in known:
        images, masks = slice_pairs(case)
        middle = middle_slices(len(images))
        lv = (masks == LV).float().mean(dim=(2, 3))
        lv = lv if lv.any() else torch.full_like(lv, math.nan)
        lv = lv.masked_fill((lv == 0) & (masks == NOT_DRAWN).any(dim=3).any(dim=2), math.nan)
        targets = torch.full((len(images),), math.nan)
        targets[middle] = ef
        taken = slice(None) if whole_stacks else middle
        stacks.append(images[taken])
        areas.append(lv[taken])
        efs.append(targets[taken])
    mean_ef = float(np.mean([ef for _, ef in known]))
    return Examples(torch.cat(centred(stacks)), torch.cat(efs), torch.cat(areas), mean_ef)
