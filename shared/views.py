"""From a case's frames to what the networks see: ED/ES slice pairs on one grid, and random views of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.case import BACKGROUND, ED, ES, LV, NOT_DRAWN, Case

IMAGE_SIZE = 64
"""Height and width in pixels of the images of the ejection fraction's network, and of the first generators."""
PIXEL_MM = 2.0
"""In-plane pixel of these images: 128 mm, the left ventricle with its surroundings."""


@dataclass(frozen=True)
class Grid:
    """A square grid about the centre of a case's images.

    Attributes:
        size_px: Height and width.
        pixel_mm: Distance of rows, and of columns.
    """

    size_px: int
    pixel_mm: float

    def is_of(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> bool:
        """Whether images of this shape and spacing lie on this grid."""
        return tuple(shape) == (self.size_px,) * 2 and all(abs(mm - self.pixel_mm) < 1e-6 for mm in spacing_mm)


MAX_SHIFT_MM = 6.0
"""Random views are shifted by up to this."""
NETWORK_GRID = Grid(IMAGE_SIZE, PIXEL_MM)
"""The grid of the ejection fraction's network. A generator has that of its file, by default this one."""


def grid_of(case: Case) -> tuple[float, float]:
    """Distance of rows and of columns in millimetres."""
    return float(case.spacing_mm[1]), float(case.spacing_mm[2])


def slice_pairs(case: Case, grid: Grid = NETWORK_GRID) -> tuple[Tensor, Tensor]:
    """All slices of a case on a network's grid.

    Returns:
        images: Shape (Z, 2, size, size), float32 in [-1, 1], ED and ES as channels; (Z, 2, 64, 64) by default.
        masks: The same shape, uint8 labels 0..3 and 255 (`NOT_DRAWN`).
    """
    images = torch.from_numpy(case.frames).transpose(0, 1) * 2 - 1
    masks = torch.from_numpy(case.masks).transpose(0, 1)
    size = (grid.size_px, grid.size_px)
    theta = _theta(case.frames.shape[2:], grid_of(case), size, (grid.pixel_mm, grid.pixel_mm))
    return _resample(images, masks, theta.expand(len(images), 2, 3), size)


def resampled(
    images: Tensor, spacing_mm: Sequence[float], size: Sequence[int], new_spacing_mm: Sequence[float]
) -> Tensor:
    """Bilinear interpolation on another grid with the same centre; 0 beyond the edge.

    Args:
        images: Shape (N, C, h, w).
        spacing_mm: Distance of their rows and columns.
        size: Height and width of the new grid.
        new_spacing_mm: Distance of its rows and columns.
    """
    theta = _theta(images.shape[2:], spacing_mm, size, new_spacing_mm).to(images.dtype).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def _theta(
    size: Sequence[int], spacing_mm: Sequence[float], new_size: Sequence[int], new_spacing_mm: Sequence[float]
) -> Tensor:
    """From a new grid to the old one of the same centre, as `affine_grid` takes it; shape (2, 3)."""
    field_mm = torch.tensor(size) * torch.tensor([float(mm) for mm in spacing_mm]).double()
    scale = torch.tensor(new_size) * torch.tensor([float(mm) for mm in new_spacing_mm]).double() / field_mm
    return torch.tensor([[float(scale[1]), 0, 0], [0, float(scale[0]), 0]])


def with_heart(masks: Tensor) -> Tensor:
    """Which of (Z, 2, H, W) masks hold left ventricle at ED, or at ES where ED is not drawn; shape (Z,), bool."""
    cavity = (masks == LV).any(dim=(2, 3))
    return cavity[:, ED] | (cavity[:, ES] & (masks[:, ED] == NOT_DRAWN).any(dim=(1, 2)))


def drawn_whole(masks: Tensor) -> Tensor:
    """In which of (Z, 2, H, W) masks nothing is `NOT_DRAWN`, in neither frame; shape (Z,), bool."""
    return ~(masks == NOT_DRAWN).flatten(1).any(dim=1)


def augment(
    images: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    max_rotation_deg: float = 30.0,
    max_scale: float = 0.1,
    max_shift_px: float = MAX_SHIFT_MM / PIXEL_MM,
) -> tuple[Tensor, Tensor]:
    """Random rotation, scale and shift, one draw per image; ED and ES move together.

    Args:
        images: Shape (N, 2, H, W).
        masks: Shape (N, 2, H, W), uint8. Beyond the edge is background, or `NOT_DRAWN` in a frame that has some.
        generator: Source of the draws.
        max_rotation_deg: Rotation is uniform in +-this.
        max_scale: Zoom is uniform in 1 +- this.
        max_shift_px: Shift is uniform in +-this, along rows and columns.
    """
    num, size = len(images), images.shape[-1]
    draw = torch.rand(4, num, generator=generator) * 2 - 1
    angle = draw[0] * math.radians(max_rotation_deg)
    zoom = 1 + draw[1] * max_scale
    shift = draw[2:] * (2 * max_shift_px / size)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    return _resample(images, masks, theta, (size, size))


def augment_in_equal_time(
    images: Tensor, masks: Tensor, generator: torch.Generator, **how: float
) -> tuple[Tensor, Tensor]:
    """`augment`, in a time that does not tell whether somebody is drawn in part.

    With labels one higher, and `NOT_DRAWN` at 0 because eight bits wrap around, no mask is one in part to `augment`. It
    leaves 0 beyond the edge, which is background but in frames that are drawn in part.
    """
    in_part = (masks == NOT_DRAWN).flatten(2).any(2)[:, :, None, None]
    images, moved = augment(images, masks + 1, generator, **how)
    moved = moved - 1
    return images, torch.where((moved == NOT_DRAWN) & ~in_part, BACKGROUND, moved)


def warp(images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """Mirror, rotate, zoom and shift about the centre; beyond the edge the image is mirrored.

    Args:
        images: Shape (N, C, H, W) with H = W.
        angle: Shape (N,), radians.
        scale: Shape (N,), above 1 enlarges.
        shift: Shape (N, 2), pixels along x and y.
        mirror: Shape (N, 2), +1 or -1 along x and y.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # affine_grid maps output to input coordinates: the inverse of what is done to the image.
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2) * mirror[:, :, None]
    offset = -(rotation @ (shift * 2 / images.shape[-1])[:, :, None])
    grid = F.affine_grid(torch.cat([rotation, offset], -1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _resample(images: Tensor, masks: Tensor, theta: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images bilinearly, masks by nearest neighbour, at one affine grid; beyond the edge the image is mirrored.

    Masks are background there, but `NOT_DRAWN` in frames in which something is: what was not drawn within the image may
    go on outside it.
    """
    grid = F.affine_grid(theta, [len(images), 2, *size], align_corners=False)
    resampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    labels = F.grid_sample(masks.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    in_part = (masks == NOT_DRAWN).any(dim=3, keepdim=True).any(dim=2, keepdim=True)
    if in_part.any():
        one = torch.ones_like(masks[:, :1], dtype=torch.float32)
        outside = F.grid_sample(one, grid, mode="nearest", padding_mode="zeros", align_corners=False) == 0
        labels = torch.where(in_part & outside, float(NOT_DRAWN), labels)
    return resampled, labels.to(torch.uint8)
