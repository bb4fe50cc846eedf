"""A recoloured picture has the code that was asked for, and keeps its shapes; a regrained one has its noise."""

import numpy as np
import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.intensity_matching import recolour, regrain
from fedcmr.server.generation.rendering import render
from fedcmr.shared.case import LV, MYO, RV
from fedcmr.shared.style import STYLE_NAMES, style_vectors


def sketches(num: int = 12):
    rng = torch.Generator().manual_seed(4)
    hearts = draw_hearts(num, rng, 5)
    d = distances(hearts, slice_positions(hearts, 5))
    return render(hearts, d, rng), masks_from(d)


def test_region_means_and_spreads_move_to_the_code():
    sketch, masks = sketches()
    own = style_vectors(sketch, masks)
    asked = own.roll(1, dims=0)  # every heart in its neighbour's colours: a plausible code that is not its own
    got = style_vectors(recolour(sketch, masks, asked), masks)
    for name, share in (("lv_mean", 0.15), ("myo_mean", 0.25), ("rv_mean", 0.25), ("far_mean", 0.25), ("lv_std", 0.6)):
        k = STYLE_NAMES.index(name)
        before, after = (asked[:, k] - own[:, k]).abs().mean(), (asked[:, k] - got[:, k]).abs().mean()
        assert after < share * before, name


def test_its_own_code_leaves_a_sketch_nearly_as_it_was():
    sketch, masks = sketches()
    same = recolour(sketch, masks, style_vectors(sketch, masks))
    assert (same - sketch).abs().mean() < 0.01


def test_order_of_grey_values_inside_a_region_is_kept():
    sketch, masks = sketches(3)
    masks[...] = MYO  # one region: the map must be one affine function
    code = torch.nan_to_num(style_vectors(sketch, masks))
    code[:, STYLE_NAMES.index("myo_mean")] *= 0.5
    code[:, STYLE_NAMES.index("myo_std")] *= 0.5
    got = recolour(sketch, masks, code)
    for before, after in zip(sketch.reshape(3, -1).numpy(), got.reshape(3, -1).numpy(), strict=True):
        assert np.corrcoef(before, after)[0, 1] > 0.999


def test_a_heart_without_a_region_stays_finite():
    sketch, masks = sketches(2)
    masks[masks == RV] = 0
    masks[0][masks[0] == LV] = 0
    raw = torch.nan_to_num(style_vectors(sketch, masks), nan=0.0)
    assert recolour(sketch, masks, raw).isfinite().all()


def test_noise_is_added_until_the_code_is_met_and_never_removed():
    sketch, masks = sketches()
    grain = STYLE_NAMES.index("grain")
    own = style_vectors(sketch, masks)
    asked = own.clone()
    asked[::2, grain] *= 2
    asked[1::2, grain] *= 0.5
    got = regrain(sketch, masks, asked, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(style_vectors(got, masks)[::2, grain], asked[::2, grain], rtol=0.15)
    assert torch.equal(got[1::2], sketch[1::2])
    means = [STYLE_NAMES.index(name) for name in ("lv_mean", "myo_mean", "far_mean")]
    assert (style_vectors(got, masks) - own)[:, means].abs().max() < 0.03


def test_noise_follows_from_its_seed():
    sketch, masks = sketches(2)
    asked = 2 * style_vectors(sketch, masks)
    first, again, other = (regrain(sketch, masks, asked, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
