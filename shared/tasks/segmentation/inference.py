"""Labels of whole patients, from their frames alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcmr.shared.case import Case
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, probabilities
from fedcmr.shared.views import grid_of, resampled, slice_pairs


def predict_masks(segmenter: Segmenter, cases: Sequence[Case]) -> list[Tensor]:
    """Labels of every case on its own grid; each of shape (2, Z, H, W), uint8.

    The network sees the images on its own grid; its probabilities are brought to the case's, where the likeliest label
    is taken. Beyond the network's field of view there is background.
    """
    return [likely.argmax(2).to(torch.uint8).transpose(0, 1) for likely in predict_probabilities(segmenter, cases)]


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
