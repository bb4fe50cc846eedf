"""A matched image has the style vector that was requested, and keeps its shapes; and it has its noise level."""

import math

import numpy as np
import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.intensity_matching import match_dark_shares, match_intensities, match_noise
from fedcmr.server.generation.rendering import render
from fedcmr.shared.case import LV, MYO, RV
from fedcmr.shared.style import STYLE_NAMES, style_vectors
from fedcmr.shared.trabeculae import dark_shares


def rendered_hearts(num: int = 12):
    rng = torch.Generator().manual_seed(4)
    hearts = draw_hearts(num, rng, 5)
    d = distances(hearts, slice_positions(hearts, 5))
    return render(hearts, d, rng), masks_from(d)


def test_region_means_and_spreads_move_to_the_style_vector():
    images, masks = rendered_hearts()
    own = style_vectors(images, masks)
    requested = own.roll(1, dims=0)  # every heart in its neighbour's style: a plausible one that is not its own
    got = style_vectors(match_intensities(images, masks, requested), masks)
    for name, share in (
        ("lv_mean", 0.15),
        ("myo_mean", 0.25),
        ("rv_mean", 0.25),
        ("background_mean", 0.25),
        ("lv_std", 0.6),
    ):
        k = STYLE_NAMES.index(name)
        before, after = (requested[:, k] - own[:, k]).abs().mean(), (requested[:, k] - got[:, k]).abs().mean()
        assert after < share * before, name


def test_its_own_style_leaves_an_image_nearly_as_it_was():
    images, masks = rendered_hearts()
    same = match_intensities(images, masks, style_vectors(images, masks))
    assert (same - images).abs().mean() < 0.01


def test_order_of_grey_values_inside_a_region_is_kept():
    images, masks = rendered_hearts(3)
    masks[...] = MYO  # one region: the map must be one affine function
    style = torch.nan_to_num(style_vectors(images, masks))
    style[:, STYLE_NAMES.index("myo_mean")] *= 0.5
    style[:, STYLE_NAMES.index("myo_std")] *= 0.5
    got = match_intensities(images, masks, style)
    for before, after in zip(images.reshape(3, -1).numpy(), got.reshape(3, -1).numpy(), strict=True):
        assert np.corrcoef(before, after)[0, 1] > 0.999


def test_a_heart_without_a_region_stays_finite():
    images, masks = rendered_hearts(2)
    masks[masks == RV] = 0
    masks[0][masks[0] == LV] = 0
    raw = torch.nan_to_num(style_vectors(images, masks), nan=0.0)
    assert match_intensities(images, masks, raw).isfinite().all()


def test_noise_is_added_until_the_level_is_met_and_never_removed():
    images, masks = rendered_hearts()
    noise_level = STYLE_NAMES.index("noise_level")
    own = style_vectors(images, masks)
    requested = own.clone()
    requested[::2, noise_level] *= 2
    requested[1::2, noise_level] *= 0.5
    got = match_noise(images, masks, requested, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(style_vectors(got, masks)[::2, noise_level], requested[::2, noise_level], rtol=0.15)
    assert torch.equal(got[1::2], images[1::2])
    means = [STYLE_NAMES.index(name) for name in ("lv_mean", "myo_mean", "background_mean")]
    assert (style_vectors(got, masks) - own)[:, means].abs().max() < 0.03


def test_noise_follows_from_its_seed():
    images, masks = rendered_hearts(2)
    requested = 2 * style_vectors(images, masks)
    first, again, other = (
        match_noise(images, masks, requested, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_share_of_the_cavity_becomes_dark_and_nothing_else_changes():
    images, masks = rendered_hearts()
    wanted = torch.tensor([[0.3, 0.5]] * len(images))
    wanted[0] = math.nan
    found = match_dark_shares(images, masks, wanted, torch.Generator().manual_seed(0))
    assert torch.equal(found[0], images[0]) and torch.equal(found[masks != LV], images[masks != LV])
    np.testing.assert_allclose(dark_shares(found, masks)[1:], wanted[1:], atol=0.03)
    again = match_dark_shares(found, masks, wanted * 0.6, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(dark_shares(again, masks)[1:], 0.6 * wanted[1:], atol=0.03)
