"""Brings the left ventricle to the middle of the pictures, where the regressor expects it.

Scans are cropped around whatever a site could find of the heart, so the ventricle lies up to 3 cm off the middle. The
public segmenter finds it from the pixels alone, on synthetic training pictures and on scans alike; no mask is used.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.segmentation import Segmenter, load_segmenter, segment
from shared.case import LV

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
    if not stacks:
        return []
    labels = segment(segmenter or _shipped_segmenter(), torch.cat(list(stacks)))
    sizes = [len(stack) for stack in stacks]
    return [_shifted(stack, *_offset(found == LV)) for stack, found in zip(stacks, labels.split(sizes), strict=True)]


def _offset(lv: Tensor) -> tuple[int, int]:
    """Rows and columns from the picture's middle to the ventricle's: the median over slices and phases.

    Args:
        lv: Shape (Z, 2, H, W), bool.
    """
    size = lv.shape[-1]
    pictures = lv.reshape(-1, size, size).float()
    area = pictures.sum(dim=(1, 2))
    found = area >= MIN_LV_PX
    if not found.any():
        return 0, 0
    axis = torch.arange(size) - (size - 1) / 2
    rows = (pictures.sum(2) @ axis)[found] / area[found]
    columns = (pictures.sum(1) @ axis)[found] / area[found]
    return round(float(rows.median())), round(float(columns.median()))


def _shifted(stack: Tensor, down: int, right: int) -> Tensor:
    """What lies `down` and `right` of the middle comes to the middle."""
    margin = max(abs(down), abs(right))
    padded = F.pad(stack, (margin,) * 4, mode="reflect")
    height, width = stack.shape[-2:]
    return padded[..., margin + down : margin + down + height, margin + right : margin + right + width]


@functools.lru_cache(maxsize=1)
def _shipped_segmenter() -> Segmenter:
    return load_segmenter()
