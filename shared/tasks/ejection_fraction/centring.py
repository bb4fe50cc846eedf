"""Brings the left ventricle to the middle of the images, where the regressor expects it.

Scans are cropped around whatever a site could find of the heart, so the ventricle lies up to 3 cm off the middle. The
public segmenter finds it from the pixels alone, on synthetic training images and on scans alike; no mask is used.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.tasks.segmentation.finds import finds_of_cavity
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter, segment

MIN_LV_PX = 20
"""Smaller finds (0.8 cm2) are left out: they are more often a vessel than an apex."""


def centred(stacks: Sequence[Tensor], segmenter: Segmenter | None = None) -> list[Tensor]:
    """Shift each stack by whole pixels so that its left ventricle lies in the middle.

    Args:
        stacks: One tensor (Z, 2, H, W) in [-1, 1] per patient; Z may differ.
        segmenter: None for the one that ships.

    Returns:
        Stacks of the same shapes, mirrored at the border; one in which no ventricle is found stays as it is.
    """
    return [_shifted(stack, *offset) for stack, offset in zip(stacks, _offsets(stacks, segmenter), strict=True)]


def centred_with_masks(
    stacks: Sequence[Tensor], masks: Sequence[Tensor], segmenter: Segmenter | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """`centred`, with masks that go along; where they end there is no heart, so that they are not mirrored.

    Args:
        stacks: As in `centred`; where the ventricle lies is found on them alone.
        masks: One tensor (Z, 2, H, W), uint8, per patient.
        segmenter: As in `centred`.
    """
    offsets = _offsets(stacks, segmenter)
    return (
        [_shifted(stack, *offset) for stack, offset in zip(stacks, offsets, strict=True)],
        [_shifted(labels, *offset, mode="constant") for labels, offset in zip(masks, offsets, strict=True)],
    )


def _offsets(stacks: Sequence[Tensor], segmenter: Segmenter | None) -> list[tuple[int, int]]:
    """`_offset` of every stack's ventricle, found on the images of all of them at once."""
    if not stacks:
        return []
    labels = segment(segmenter or _shipped_segmenter(), torch.cat(list(stacks)))
    return [_offset(ventricles(found)) for found in labels.split([len(stack) for stack in stacks])]


def ventricles(labels: Tensor) -> Tensor:
    """In every image the one find that is large and lies in muscle; others are vessels or the stomach.

    On the public development patients the largest find alone was once 4 cm off, and the centre of all finds 3 cm.

    Args:
        labels: Shape (Z, 2, H, W), uint8 labels 0..3.

    Returns:
        Shape (Z, 2, H, W), bool.
    """
    chosen = np.zeros(labels.shape, dtype=bool)
    images = labels.flatten(0, 1).numpy()
    for image, place in zip(images, chosen.reshape(images.shape), strict=True):
        score = 0.0
        for find, share in finds_of_cavity(image):
            in_muscle = share * int(find.sum())
            if in_muscle > score:
                score = in_muscle
                place[:] = find
    return torch.from_numpy(chosen)


def _offset(lv: Tensor) -> tuple[int, int]:
    """Rows and columns from the image's middle to the ventricle's: the median over slices and phases.

    Args:
        lv: Shape (Z, 2, H, W), bool.
    """
    size = lv.shape[-1]
    images = lv.reshape(-1, size, size).float()
    area = images.sum(dim=(1, 2))
    found = area >= MIN_LV_PX
    if not found.any():
        return 0, 0
    axis = torch.arange(size) - (size - 1) / 2
    rows = (images.sum(2) @ axis)[found] / area[found]
    columns = (images.sum(1) @ axis)[found] / area[found]
    return round(float(rows.median())), round(float(columns.median()))


def _shifted(stack: Tensor, down: int, right: int, mode: str = "reflect") -> Tensor:
    """What lies `down` and `right` of the middle comes to the middle."""
    margin = max(abs(down), abs(right))
    padded = F.pad(stack, (margin,) * 4, mode=mode)
    height, width = stack.shape[-2:]
    return padded[..., margin + down : margin + down + height, margin + right : margin + right + width]


@functools.lru_cache(maxsize=1)
def _shipped_segmenter() -> Segmenter:
    return load_segmenter()
