"""What a ResNet50 learns from: slice pairs of many patients, the ventricle in the middle, with their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.localisation import centred
from shared.anatomy import ejection_fraction
from shared.case import LV, Case
from shared.errors import UserError
from shared.views import slice_pairs

MIDDLE_SHARE = 0.6


@dataclass(frozen=True)
class Examples:
    """Slice pairs of many patients with their targets, as tensors.

    Attributes:
        images: Shape (M, 2, H, W), float32 in [-1, 1].
        ef: Shape (M,), the patient's ejection fraction; NaN in slices that shall not tell it, outside the middle.
        areas: Shape (M, 2), LV area at ED and ES as a fraction of the picture; NaN where the patient has no mask.
        mean_ef: Mean over patients, not over slices.
    """

    images: Tensor
    ef: Tensor
    areas: Tensor
    mean_ef: float


def middle_slices(num_slices: int) -> slice:
    """The middle of a stack by index, in training and testing alike: the central 60 %.

    Basal slices open into the atrium and apical ones blur; which these are must not be read from a mask.
    """
    kept = max(1, round(MIDDLE_SHARE * num_slices))
    first = (num_slices - kept) // 2
    return slice(first, first + kept)


def patient_ef(case: Case) -> float:
    """The ejection fraction in the case's row, else of its masks; NaN where neither is known."""
    return case.info.ef if math.isfinite(case.info.ef) else ejection_fraction(case.masks)


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
        pictures, masks = slice_pairs(case)
        middle = middle_slices(len(pictures))
        lv = (masks == LV).float().mean(dim=(2, 3))
        lv = lv if lv.any() else torch.full_like(lv, math.nan)
        told = torch.full((len(pictures),), math.nan)
        told[middle] = ef
        taken = slice(None) if whole_stacks else middle
        stacks.append(pictures[taken])
        areas.append(lv[taken])
        efs.append(told[taken])
    mean_ef = float(np.mean([ef for _, ef in known]))
    return Examples(torch.cat(centred(stacks)), torch.cat(efs), torch.cat(areas), mean_ef)
