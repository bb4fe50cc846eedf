"""Which slices of which patients are compared: all on one grid, each patient with equally many."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcmr.shared.case import ED, ES, LV, MYO, RV, STRUCTURES, Case
from fedcmr.shared.views import Grid, slice_pairs

NUM_SLICES = 5
"""Slice pairs of a patient, so that a long stack counts no more than a short one."""
MIN_PIXELS = 12
"""Least area of a structure in a slice that is compared: texture needs neighbours."""
MOST = 0.8
"""Least share of the patients of every group that show a structure which is compared."""
NAMES = {RV: "right ventricle", MYO: "myocardium", LV: "left ventricle"}

Region = tuple[int, int]
"""Phase and structure."""


@dataclass(frozen=True)
class Samples:
    """Slice pairs of some patients.

    Attributes:
        images: Shape (P, NUM_SLICES, 2, H, W), float32 in [-1, 1], ED and ES.
        masks: The same shape, uint8 labels 0..3 and 255.
    """

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)


def common_regions(groups: Sequence[Sequence[Case]], grid: Grid) -> list[Region]:
    """The structures, by phase, that most patients of every group show: what nobody drew cannot be compared.

    Args:
        groups: Real patients, for example by vendor.
        grid: The grid of the comparison.
    """
    shown = [
        np.array(
            [[(_areas(slice_pairs(case, grid)[1], region) >= MIN_PIXELS).any() for region in _ALL] for case in cases]
        )
        for cases in groups
    ]
    return [region for i, region in enumerate(_ALL) if all(rows[:, i].mean() >= MOST for rows in shown if len(rows))]


def sample_slices(cases: Sequence[Case], regions: Sequence[Region], grid: Grid) -> Samples:
    """`NUM_SLICES` of every patient, evenly spread over the slices that show all the regions, repeated where fewer do.

    A patient without such a slice is left out.
    """
    images, masks = [], []
    for case in cases:
        pairs, labels = slice_pairs(case, grid)
        fit = torch.stack([_areas(labels, region) >= MIN_PIXELS for region in regions]).all(0).nonzero()[:, 0]
        if len(fit):
            chosen = fit[torch.linspace(0, len(fit) - 1, NUM_SLICES).round().long()]
            images.append(pairs[chosen])
            masks.append(labels[chosen])
    empty = torch.empty(0, NUM_SLICES, 2, grid.size_px, grid.size_px)
    return Samples(
        torch.stack(images) if images else empty,
        torch.stack(masks) if masks else empty.to(torch.uint8),
    )


def region_name(region: Region) -> str:
    """A region for the reader."""
    phase, label = region
    return f"{NAMES[label]} at {'ED' if phase == ED else 'ES'}"


_ALL: list[Region] = [(phase, label) for phase in (ED, ES) for label in STRUCTURES]


def _areas(masks: Tensor, region: Region) -> Tensor:
    """Pixels of a region in each of (Z, 2, H, W); shape (Z,)."""
    phase, label = region
    return (masks[:, phase] == label).sum(dim=(1, 2))
