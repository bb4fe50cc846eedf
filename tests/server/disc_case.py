"""A patient whose ejection fraction anybody can see."""

import math

import numpy as np

from fedcmr.shared.case import LV, MYO, Case, CaseInfo


def disc_case(pseudonym: str, ef: float, num_slices: int = 6, size: int = 64, seed: int = 0) -> Case:
    """A bright disc in a darker ring whose ES area is (1 - ef) of its ED area."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    radius = np.hypot(y, x)
    masks = np.zeros((2, num_slices, size, size), np.uint8)
    for phase, shrink in ((0, 1.0), (1, math.sqrt(1 - ef))):
        masks[phase, :, radius < size / 5 * shrink + 4] = MYO
        masks[phase, :, radius < size / 5 * shrink] = LV
    frames = np.where(masks == LV, 0.8, np.where(masks == MYO, 0.2, 0.4)) + rng.normal(0, 0.02, masks.shape)
    info = CaseInfo(pseudonym, "Siemens", 1.5, ef, pseudonym)
    return Case(info, frames.clip(0, 1).astype(np.float32), masks, np.array([10, 2, 2], np.float32))
