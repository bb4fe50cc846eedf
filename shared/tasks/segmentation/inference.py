"""Labels of whole patients, from their frames alone."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fedcmr.shared.case import BACKGROUND, LV, MYO, RV, Case
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, probabilities
from fedcmr.shared.views import grid_of, resampled, slice_pairs


def predict_masks(segmenter: Segmenter, cases: Sequence[Case]) -> list[Tensor]:
    """Labels of every case on its own grid; each of shape (2, Z, H, W), uint8.

    The network sees the images on its own grid; its probabilities are brought to the case's, where the likeliest label
    is taken. Beyond the network's field of view there is background. Of every phase `one_heart` is kept.
    """
    stacks = (likely.argmax(2).to(torch.uint8).transpose(0, 1) for likely in predict_probabilities(segmenter, cases))
    return [torch.stack([one_heart(labels) for labels in stack]) for stack in stacks]


def one_heart(labels: Tensor) -> Tensor:
    """Labels of a stack without what lies apart: the largest connected left ventricle and the largest right one.

    Cavity and muscle are one region here. Where a slice in the middle is missed, each of them alone falls apart, and
    its larger part is not always the heart's. Muscle without a cavity is a ventricle only where there is no other.

    Args:
        labels: Shape (Z, H, W), uint8 0..3; left as it is.
    """
    found = labels.numpy()
    cavity = found == LV
    kept = _largest_part(cavity | (found == MYO), cavity) | _largest_part(found == RV)
    return torch.from_numpy(np.where(kept, found, BACKGROUND).astype(np.uint8))


def _largest_part(region: NDArray[np.bool_], core: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """The largest connected part, across corners too, of a region in (Z, H, W): of those that hold some of a core."""
    parts, num = ndimage.label(region, np.ones((3, 3, 3)))
    if num < 2:
        return region
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    if core is not None and core.any():
        sizes[np.setdiff1d(np.arange(num + 1), parts[core])] = 0
    return parts == int(np.argmax(sizes))


def predict_probabilities(segmenter: Segmenter, cases: Sequence[Case]) -> list[Tensor]:
    """Probability of every label in every case on its own grid; each of shape (Z, 2, 4, H, W), float32."""
    if not cases:
        return []
    grid = segmenter.architecture.grid
    stacks = [slice_pairs(case, grid)[0] for case in cases]
    likely = probabilities(segmenter, torch.cat(stacks)).split([len(stack) for stack in stacks])
    return [_on_the_case(of_case, segmenter, case) for of_case, case in zip(likely, cases, strict=True)]


def _on_the_case(likely: Tensor, segmenter: Segmenter, case: Case) -> Tensor:
    """Probabilities (Z, 2, 4, h, w) on the segmenter's grid -> (Z, 2, 4, H, W) on the case's."""
    theirs, own = segmenter.architecture.grid, grid_of(case)
    shape = case.frames.shape[2:]
    if theirs.is_of(shape, own):
        return likely
    moved = resampled(likely.flatten(1, 2), (theirs.pixel_mm, theirs.pixel_mm), shape, own)
    moved = moved.unflatten(1, likely.shape[1:3])
    moved[:, :, 0] += 1 - moved.sum(2)  # what lies beyond has no probabilities yet
    return moved
