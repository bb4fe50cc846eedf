"""Training examples of a segmenter: slice pairs with complete masks, and random views of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcmr.server.settings import AugmentationConfig
from fedcmr.server.training.augmentation import augment_pairs
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, Case
from fedcmr.shared.errors import UserError
from fedcmr.shared.views import augment, slice_pairs

NEEDS = "masks of both ventricles and the muscle at ED and at ES"
INTENSITIES = AugmentationConfig(
    rotation_deg=0,
    log_scale=0,
    shift_px=0,
    flip=False,
    log_gamma=0.3,
    contrast=0.15,
    brightness=0.06,
    blur_px=0.7,
    noise=0.04,
    log_bias=0.1,
)
"""Contrast, shading, sharpness and noise only: the masks must move with the images, which `random_views` does."""


@dataclass(frozen=True)
class Examples:
    """Slice pairs with their masks.

    Attributes:
        images: Shape (M, 2, 64, 64), float32 in [-1, 1], or uint8 with 0..255 for -1..1.
        masks: Shape (M, 2, 64, 64), uint8 labels 0..3.
    """

    images: Tensor
    masks: Tensor

    def images_at(self, index: Tensor | slice) -> Tensor:
        """Chosen pairs, shape (N, 2, 64, 64), float32 in [-1, 1]."""
        images = self.images[index]
        return images if images.is_floating_point() else images.float() / 127.5 - 1


def is_segmented(case: Case) -> bool:
    """Whether the masks can teach and test a segmenter: each structure is somewhere in the stack at ED and at ES.

    Masks that are empty in a frame, or contain cavities only, are incomplete: the structures were not drawn. Slices
    without any label within a segmented frame lie beyond the heart.
    """
    if (case.masks == NOT_DRAWN).any():
        return False
    return all((case.masks[phase] == label).any() for phase in (ED, ES) for label in (RV, MYO, LV))


def prepare_examples(cases: Sequence[Case]) -> Examples:
    """All slices of the segmented cases.

    Raises:
        UserError: There is no such case.
    """
    pairs = [slice_pairs(case) for case in cases if is_segmented(case)]
    if not pairs:
        raise UserError(f"none of the {len(cases)} training cases has {NEEDS}: segment them and prepare them again")
    return Examples(torch.cat([images for images, _ in pairs]), torch.cat([masks for _, masks in pairs]))


def random_views(examples: Examples, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """One step's batch: turned, mirrored, zoomed and shifted with its masks, then given other intensities.

    Returns:
        Images and masks, shape (batch_size, 2, 64, 64); everything random follows from (seed, step).
    """
    rng = torch.Generator().manual_seed(seed * 7_368_787 + step)
    index = torch.randint(len(examples.images), (batch_size,), generator=rng)
    images, masks = augment(
        examples.images_at(index),
        examples.masks[index],
        rng,
        max_rotation_deg=45,
        max_scale=0.2,
        max_shift_px=5,
    )
    mirrored = torch.rand(len(index), 1, 1, 1, generator=rng) < 0.5
    images, masks = (torch.where(mirrored, values.flip(3), values) for values in (images, masks))
    return augment_pairs(images, INTENSITIES, rng)[0], masks
