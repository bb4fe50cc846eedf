"""From a case's frames to what the networks see: ED/ES slice pairs on one grid, and random views of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.case import ED, ES, LV, NOT_DRAWN, Case

IMAGE_SIZE = 64
"""Height and width of the networks' images in pixels."""
PIXEL_MM = 2.0
"""In-plane pixel of the networks' images: 128 mm, the left ventricle with its surroundings."""


def slice_pairs(case: Case) -> tuple[Tensor, Tensor]:
    """All slices of a case on the networks' grid.

    Returns:
        images: Shape (Z, 2, 64, 64), float32 in [-1, 1], ED and ES as channels.
        masks: Shape (Z, 2, 64, 64), uint8 labels 0..3 and 255 (`NOT_DRAWN`).
    """
    images = torch.from_numpy(case.frames).transpose(0, 1) * 2 - 1
    masks = torch.from_numpy(case.masks).transpose(0, 1)
    field_mm = torch.tensor(case.frames.shape[2:]) * torch.from_numpy(case.spacing_mm[1:]).double()
    scale = IMAGE_SIZE * PIXEL_MM / field_mm
    theta = torch.tensor([[float(scale[1]), 0, 0], [0, float(scale[0]), 0]]).expand(len(images), 2, 3)
    return _resample(images, masks, theta, (IMAGE_SIZE, IMAGE_SIZE))


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
    max_shift_px: float = 3.0,
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
