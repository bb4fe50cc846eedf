"""How much more or less of a bent scan's cavity must be dark to be like a vendor's patients.

What is dark within the contours is trabeculae and papillary muscles, as a scanner shows them and as readers draw around
them. Both differ between sites, and a network that reads ejection fractions learns what belongs together. The sites
release how much it is (`fedcmr.shared.trabeculae`); of the public scans it is known.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedcmr.server.generation.guide_scans import GuideScans
from fedcmr.shared.shape import GEOMETRY_NAMES, SPREAD, ShapeDistribution, case_shape
from fedcmr.shared.views import Grid, slice_pairs

MAX_SHIFT = 0.15
"""Of the share that is dark: what sites differ by, and not what a few patients' chance and the noise may add."""


def dark_shifts(
    populations: Mapping[str, ShapeDistribution], names: Sequence[str], guides: GuideScans, grid: Grid
) -> Tensor | None:
    """How much more of the cavity is dark in each heart's vendor's patients than in the guides, at ED and ES.

    Both are compared with public hearts of the same ejection fraction (`fedcmr.shared.shape`).

    Args:
        populations: Vendor -> its released shapes.
        names: Shape (N,), vendors.
        guides: The scans.
        grid: Of the images on which the sites measured.

    Returns:
        Shape (N, 2), shares of the cavity; NaN for vendors without a population; None where none has one.
    """
    if not set(names) & set(populations):
        return None
    size = len(GEOMETRY_NAMES)
    own = standardised_shares(guides, grid).nanmean(dim=0)
    spread = torch.tensor(SPREAD, dtype=torch.float64)[size:]
    unknown = torch.full((2,), math.nan, dtype=torch.float64)
    shifts = {name: spread * (shape.mean[size:].double() - own) for name, shape in populations.items()}
    found = torch.stack([shifts.get(name, unknown) for name in names])
    return found.clamp(-MAX_SHIFT, MAX_SHIFT).float()


@lru_cache(maxsize=1)
def standardised_shares(guides: GuideScans, grid: Grid) -> Tensor:
    """The last two entries of each scan's shape vector, measured on a grid; shape (N, 2)."""
    shapes = [case_shape(scan.case, *slice_pairs(scan.case, grid)) for scan in guides.scans]
    return torch.stack(shapes)[:, len(GEOMETRY_NAMES) :].double()
