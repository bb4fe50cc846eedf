"""Training examples of a segmenter: slice pairs with masks, and random views of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcmr.server.settings import AugmentationConfig, SegmentationConfig
from fedcmr.server.training.augmentation import augment_pairs
from fedcmr.shared.case import Case
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.segmentation.teaching import can_teach
from fedcmr.shared.views import NETWORK_GRID, Grid, augment, slice_pairs

NEEDS = "masks of both ventricles and the muscle at ED and at ES, or marks where they were not drawn"
INTENSITIES = AugmentationConfig(
    rotation_deg=0,
    log_scale=0,
    shift_px=0,
    flip=False,
    log_gamma=0.3,
    contrast=0.15,
    brightness=0.06,
    noise=0.04,
    log_bias=0.1,
)
"""Contrast, shading, sharpness and noise only: the masks must move with the images, which `random_views` does."""
MAX_SCALE = 0.2
BLUR_MM = 1.4


@dataclass(frozen=True)
class Examples:
    """Slice pairs with their masks.

    Attributes:
        images: Shape (M, 2, H, W), float32 in [-1, 1], or uint8 with 0..255 for -1..1.
        masks: Shape (M, 2, H, W), uint8 labels 0..3, and 255 where nobody drew.
        pixel_mm: In-plane pixel.
    """

    images: Tensor
    masks: Tensor
    pixel_mm: float = NETWORK_GRID.pixel_mm

    def images_at(self, index: Tensor | slice) -> Tensor:
        """Chosen pairs, shape (N, 2, H, W), float32 in [-1, 1]."""
        images = self.images[index]
        return images if images.is_floating_point() else images.float() / 127.5 - 1


def can_test(case: Case) -> bool:
    """Whether people drew masks by which a segmenter can be judged, whole or in part; what a program found is none."""
    return case.info.contours != "auto" and can_teach(case)


def prepare_examples(cases: Sequence[Case], grid: Grid) -> Examples:
    """All slices of the segmented cases, on a grid; images as uint8, a quarter of the memory.

    Raises:
        UserError: There is no such case.
    """
    pairs = [slice_pairs(case, grid) for case in cases if can_teach(case)]
    if not pairs:
        raise UserError(f"none of the {len(cases)} training cases has {NEEDS}: segment them and prepare them again")
    images = torch.cat([((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for images, _ in pairs])
    return Examples(images, torch.cat([masks for _, masks in pairs]), grid.pixel_mm)


def random_views(examples: Examples, config: SegmentationConfig, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """One step's batch: turned, mirrored, zoomed and shifted with its masks, cropped, then given other intensities.

    Returns:
        Images and masks, shape (batch_size, 2, crop_px, crop_px); everything random follows from (seed, step).
    """
    rng = torch.Generator().manual_seed(seed * 7_368_787 + step)
    index = torch.randint(len(examples.images), (config.batch_size,), generator=rng)
    images, masks = augment(
        examples.images_at(index),
        examples.masks[index],
        rng,
        max_rotation_deg=config.rotation_deg,
        max_scale=MAX_SCALE,
        max_shift_px=config.shift_mm / examples.pixel_mm,
    )
    cut = (images.shape[-1] - config.crop_px) // 2
    inner = slice(cut, cut + config.crop_px)
    images, masks = images[..., inner, inner], masks[..., inner, inner]
    for axis in (2, 3):
        mirrored = torch.rand(len(index), 1, 1, 1, generator=rng) < 0.5
        images, masks = (torch.where(mirrored, values.flip(axis), values) for values in (images, masks))
    intensities = replace(INTENSITIES, blur_px=BLUR_MM / examples.pixel_mm)
    return augment_pairs(images, intensities, rng)[0], masks
