"""Private training of the public segmenter on one site's patients, by the steps of `fedcmr.client.training`.

One item is one patient here too. A patient's views are averaged before the one clip, and no layer sees two patients at
once: the network stays in evaluation mode, so that its normalisation neither uses nor keeps a statistic of patients.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedcmr.client.trainable import group_of, usable_cases
from fedcmr.client.training import Learner, flat_gradient, modified_ns
from fedcmr.shared.case import INDEX_NAME
from fedcmr.shared.tasks.segmentation.losses import LOSSES, SegmentationLoss
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter, public_sha256
from fedcmr.shared.tasks.segmentation.teaching import can_teach
from fedcmr.shared.views import Grid, augment_in_equal_time, slice_pairs

LOSS_OF = SegmentationLoss(LOSSES["fixed"], equal_time=True)


@dataclass(frozen=True)
class DrawnPatient:
    """One patient as the segmenter learns from it: all slices of the scans in which somebody drew.

    Attributes:
        name: The case's group: a pseudonym. Seeds the patient's views.
        images: Shape (Z, 2, H, W), ED and ES on the segmenter's grid, float32 in [-1, 1]; Z is at least 1.
        masks: Shape (Z, 2, H, W), uint8 labels 0..3, and `NOT_DRAWN`.
    """

    name: str
    images: Tensor
    masks: Tensor


def load_drawn_patients(
    folder: Path, grid: Grid, vendors: Sequence[str] | None = None, contours: str = "any"
) -> list[DrawnPatient]:
    """A site's usable patients who can teach a segmenter; contours that a program found teach none.

    Args:
        folder: A folder of prepared cases.
        grid: The segmenter's.
        vendors: As in `fedcmr.client.trainable.trainable`.
        contours: Likewise.

    Raises:
        UserError: The folder is no folder of cases, or its index is damaged.
    """
    slices: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for case in usable_cases(folder, vendors, Counter(), contours):
        if can_teach(case):
            slices.setdefault(group_of(case.info), []).append(slice_pairs(case, grid))
    return [DrawnPatient(name, *map(torch.cat, zip(*parts, strict=True))) for name, parts in slices.items()]


def cached_drawn_patients(
    folder: Path, grid: Grid, vendors: tuple[str, ...] | None = None, contours: str = "any"
) -> list[DrawnPatient]:
    """`load_drawn_patients`, once per process."""
    return _patients_of(folder, modified_ns(folder / INDEX_NAME), grid, vendors, contours)


def segmenter_learner(segmenter: Segmenter, name: str = "segmenter") -> Learner[DrawnPatient]:
    """The segmenter, of which `Segmenter.trainable` is trained.

    Raises:
        ValueError: It is not in evaluation mode.
    """
    if any(module.training for module in segmenter.modules()):
        raise ValueError("Expected a segmenter in evaluation mode.")

    def gradient(
        patient: DrawnPatient, num_views: int, seed: int, parameters: Sequence[nn.Parameter]
    ) -> NDArray[np.float64]:
        return segmenter_gradient(segmenter, patient, num_views, seed, parameters)

    return Learner(name, segmenter, segmenter.holding, gradient, nobody(segmenter.architecture.grid))


def segmenter_gradient(
    segmenter: Segmenter, patient: DrawnPatient, num_views: int, seed: int, parameters: Sequence[nn.Parameter]
) -> NDArray[np.float64]:
    """Gradient of one patient's loss over random (slice, rotation, zoom, shift) views of both phases, flattened.

    Args:
        segmenter: Where the parameters belong, in evaluation mode.
        patient: Its slices are drawn with replacement.
        num_views: How many views.
        seed: Seed of the views.
        parameters: Parameters to differentiate, gradients on.

    Returns:
        Shape (D,), in the order of the parameters. Not clipped.
    """
    device = parameters[0].device
    rng = torch.Generator().manual_seed(seed)
    index = torch.randint(len(patient.images), (num_views,), generator=rng)
    images, masks = augment_in_equal_time(patient.images[index], patient.masks[index], rng)
    # In float32 on a CPU: at this width that is faster than bf16 is.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = segmenter(images.to(device))
    loss = LOSS_OF(logits.flatten(0, 1), masks.to(device).flatten(0, 1), 1.0)
    return flat_gradient(loss, parameters)


def nobody(grid: Grid) -> DrawnPatient:
    """One empty slice, whose gradient takes as long as anybody's."""
    images = torch.zeros(1, 2, grid.size_px, grid.size_px)
    return DrawnPatient("", images, images.to(torch.uint8))


@functools.lru_cache(maxsize=1)
def cached_segmenter() -> tuple[Segmenter, str]:
    """The public segmenter and its fingerprint, read once per process."""
    return load_segmenter(), public_sha256()


@functools.lru_cache(maxsize=8)
def _patients_of(
    folder: Path, index_ns: int, grid: Grid, vendors: tuple[str, ...] | None, contours: str
) -> list[DrawnPatient]:
    return load_drawn_patients(folder, grid, vendors, contours)
