"""Smooth deformations that lay the borders of one image's structures on those of another's.

A free-form deformation (Rueckert et al. 1999, https://doi.org/10.1109/42.796284): displacements at the knots of a
lattice, bicubic in between. They are fitted to signed distances, which say how far a border has to move and where to,
not to grey values: the two images need not look alike.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.views import Grid

NUM_KNOTS = 16
"""Along each axis."""
NUM_STEPS, RATE_MM = 30, 2.0
"""Of Adam; the displacements have settled by then."""
STIFFNESS = 0.05
"""Weight of the squared differences of neighbouring knots, in mm, against squared distances of borders."""
MAX_MM, NEAR_MM = 12.0, 6.0
"""Distances are compared up to the first, and count less the further away they are, on the scale of the second."""
FAR_WEIGHT = 0.05


@dataclass(frozen=True)
class Deformation:
    """From the pixels of B images to the points of their B sources: a zoom about a point, then displacements.

    Attributes:
        centre_mm: Shape (B, 2), x and y of the point in the image, from the centre of its grid.
        source_centre_mm: Shape (B, 2), the same point in the source.
        zoom: Shape (B,), above 1 enlarges the source.
        knots_mm: Shape (B, 2, NUM_KNOTS, NUM_KNOTS), displacements in the source, x and y.
    """

    centre_mm: Tensor
    source_centre_mm: Tensor
    zoom: Tensor
    knots_mm: Tensor

    def points_mm(self, grid: Grid) -> Tensor:
        """Where in its source each pixel of an image on this grid lies; shape (B, H, W, 2), x and y from the centre."""
        axis = (torch.arange(grid.size_px) - (grid.size_px - 1) / 2) * grid.pixel_mm
        pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        size = (grid.size_px, grid.size_px)
        moved = F.interpolate(self.knots_mm, size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
        centre, source, zoom = (x.reshape(len(x), 1, 1, -1) for x in (self.centre_mm, self.source_centre_mm, self.zoom))
        return source + (pixels - centre) / zoom + moved

    def bent(self, sources: Tensor, source_grid: Grid, grid: Grid, mode: str, beyond: str) -> Tensor:
        """The sources, bent.

        Args:
            sources: Shape (B, C, h, w), on `source_grid`.
            source_grid: Their grid.
            grid: The images' grid.
            mode: Interpolation, as of `torch.nn.functional.grid_sample`.
            beyond: What lies beyond a source's edge, as its `padding_mode`.

        Returns:
            Shape (B, C, H, W).
        """
        points = self.points_mm(grid) * (2 / (source_grid.size_px * source_grid.pixel_mm))
        return F.grid_sample(sources, points, mode=mode, padding_mode=beyond, align_corners=False)


def fit(
    borders: Tensor,
    source_grid: Grid,
    wanted: Tensor,
    grid: Grid,
    centre_mm: Tensor,
    source_centre_mm: Tensor,
    zoom: Tensor,
    weights: Tensor,
) -> Deformation:
    """The deformation that lays the borders of B sources on those that are wanted.

    Args:
        borders: Shape (B, C, h, w), signed distances in mm to the border of each structure, negative inside; positive
            everywhere where a source does not have it.
        source_grid: Their grid.
        wanted: Shape (B, C, H, W), likewise; a structure that either does not have exerts no force.
        grid: Their grid, which may be coarser and need not have the same field.
        centre_mm: See `Deformation`; likewise the next two.
        source_centre_mm: See there.
        zoom: See there.
        weights: Shape (C,), how much each structure counts.
    """
    wanted = wanted.clamp(-MAX_MM, MAX_MM)
    borders = borders.clamp(-MAX_MM, MAX_MM)
    in_both = (borders.amin(dim=(2, 3)) < 0) & (wanted.amin(dim=(2, 3)) < 0)
    weight = (torch.exp(-wanted.abs() / NEAR_MM) + FAR_WEIGHT) * (weights * in_both)[:, :, None, None]
    with torch.enable_grad():
        knots = torch.zeros(len(wanted), 2, NUM_KNOTS, NUM_KNOTS, requires_grad=True)
        optimizer = torch.optim.Adam([knots], RATE_MM)
        for _ in range(NUM_STEPS):
            now = Deformation(centre_mm, source_centre_mm, zoom, knots)
            found = now.bent(borders, source_grid, grid, "bilinear", "border") * zoom[:, None, None, None]
            missed = ((found.clamp(-MAX_MM, MAX_MM) - wanted) ** 2 * weight).mean(dim=(1, 2, 3))
            rough = sum(torch.diff(knots, dim=axis).square().mean(dim=(1, 2, 3)) for axis in (2, 3))
            optimizer.zero_grad()
            (missed + STIFFNESS * rough).sum().backward()
            optimizer.step()
    return Deformation(centre_mm, source_centre_mm, zoom, knots.detach())
