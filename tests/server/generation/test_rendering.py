"""Rendered hearts: finite, reproducible, and as wide in appearance as they are meant to be."""

import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.shared.case import LV, MYO
from fedcmr.shared.style import STYLE_NAMES, style_vectors


def rendered(num: int, seed: int):
    rng = torch.Generator().manual_seed(seed)
    hearts = draw_hearts(num, rng, 5)
    d = distances(hearts, slice_positions(hearts, 5))
    return render(hearts, d, rng), masks_from(d)


def test_images_are_scaled_finite_and_follow_the_seed():
    images, _ = rendered(8, seed=1)
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert images.amax(dim=(1, 2, 3, 4)).min() > 0.95
    assert torch.equal(images, rendered(8, seed=1)[0])
    assert not torch.equal(images, rendered(8, seed=2)[0])


def test_blood_is_brighter_than_muscle_in_nearly_every_heart():
    images, masks = rendered(40, seed=3)
    blood = torch.stack([image[mask == LV].mean() for image, mask in zip(images, masks, strict=True)])
    muscle = torch.stack([image[mask == MYO].mean() for image, mask in zip(images, masks, strict=True)])
    assert (blood > muscle).float().mean() > 0.95


def test_appearance_varies_widely_between_hearts():
    images, masks = rendered(40, seed=4)
    styles = style_vectors(images, masks)
    spread = dict(zip(STYLE_NAMES, styles.nan_to_num(0).std(0).tolist(), strict=True))
    assert spread["lv_mean"] > 0.15 and spread["myo_mean"] > 0.1 and spread["background_mean"] > 0.08
