"""A planted copy is found whatever was done to it; a fresh heart is none."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.shared.views import with_heart
from fedcmr.simulations.audit.copies import Pairs, audit, compare, rings, share_interval, share_nearer
from fedcmr.simulations.audit.tables import draw_pairs

NUM_TRAINING, NUM_HELD_OUT, NUM_FRESH = 12, 8, 8


def hearts(num: int, seed: int) -> Pairs:
    """Rendered hearts, three slices each."""
    rng = torch.Generator().manual_seed(seed)
    drawn = draw_hearts(num, rng, 3)
    d = distances(drawn, slice_positions(drawn, 3))
    images, masks = render(drawn, d, rng).flatten(0, 1), masks_from(d).flatten(0, 1)
    keep = with_heart(masks)
    owner = np.repeat(np.arange(num), 3)[keep.numpy()]
    return Pairs(images[keep], masks[keep], owner, [f"{seed}-{index}" for index in range(num)])


@pytest.fixture(scope="module")
def training():
    return hearts(NUM_TRAINING, 1)


@pytest.fixture(scope="module")
def held_out():
    return hearts(NUM_HELD_OUT, 2)


@pytest.fixture(scope="module")
def fresh():
    return hearts(NUM_FRESH, 3)


def planted(training: Pairs, quarter_turns: int, flip: bool, shift: int, noise: float) -> Pairs:
    """The training images after all that a generator may do to hide a copy."""
    images, masks = training.images, training.masks
    if flip:
        images, masks = images.flip(-1), masks.flip(-1)
    images, masks = (x.rot90(quarter_turns, (-2, -1)).roll(shift, -1) for x in (images, masks))
    pattern = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return replace(training, images=(0.8 * images + 0.1 + noise * pattern).clamp(-1, 1), masks=masks)


def found(synthetic: Pairs, training: Pairs, held_out: Pairs):
    return audit(
        *(compare(synthetic, real).distance for real in (training, held_out)), compare(held_out, training).distance
    )


@pytest.mark.parametrize("how", [(1, True, 0, 0.1), (2, False, 2, 0.1), (3, True, -1, 0.05)])
def test_a_turned_mirrored_noisy_copy_is_found(training, held_out, how):
    result = found(planted(training, *how), training, held_out)
    assert result.num_copies > 0.9 * result.num_images and result.as_dict()["copied"]
    # Eight of twelve training patients are drawn, so that the one who was copied is among them twice in three times.
    assert result.share > 2 / 3 and result.share_ci95[0] > 0.5 and result.num_near_held_out == 0


def test_every_copy_names_its_own_image(training):
    nearest = compare(planted(training, 1, True, 0, 0.1), training)
    owner = nearest.distance.argmin(1)
    assert (owner == training.owner).mean() > 0.95
    best = nearest.index[np.arange(len(owner)), owner]
    assert (best == np.arange(len(owner))).mean() > 0.8  # the slices of one heart look alike


def test_a_small_turn_hides_nothing(training):
    angle = math.radians(11)
    theta = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = torch.nn.functional.affine_grid(
        theta.expand(len(training.images), 2, 3), list(training.images.shape), align_corners=False
    )
    turned = torch.nn.functional.grid_sample(training.images, grid, padding_mode="reflection", align_corners=False)
    masks = torch.nn.functional.grid_sample(training.masks.float(), grid, mode="nearest", align_corners=False).to(
        torch.uint8
    )
    distance = compare(replace(training, images=turned, masks=masks), training).distance
    assert np.median(distance[np.arange(len(distance)), training.owner]) < 0.03


def test_fresh_hearts_are_no_copies_and_no_nearer_to_either(training, held_out, fresh):
    result = found(fresh, training, held_out)
    assert result.num_copies == 0 and not result.as_dict()["copied"]
    assert result.share_ci95[0] < 0.5 < result.share_ci95[1]


def test_one_copy_among_fresh_hearts_is_counted(training, held_out, fresh):
    one = planted(training, 1, True, 0, 0.1)
    mixed = Pairs(
        torch.cat([fresh.images, one.images[:1]]),
        torch.cat([fresh.masks, one.masks[:1]]),
        np.r_[fresh.owner, NUM_FRESH],
        [*fresh.names, "copy"],
    )
    assert found(mixed, training, held_out).num_copies == 1


def test_the_share_is_that_of_equally_many_patients():
    """Three of eight training patients are drawn against three held-out ones: counted over all 56 draws."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    to_training, to_held_out = rng.random((5, 8)), rng.random((5, 3))
    draws = [
        np.mean([min(row[list(some)]) < other.min() for some in combinations(range(8), 3)])
        for row, other in zip(to_training, to_held_out, strict=True)
    ]
    assert share_nearer(to_training, to_held_out) == pytest.approx(np.mean(draws))
    assert share_nearer(to_held_out, to_training) == pytest.approx(1 - np.mean(draws))


def test_more_training_patients_alone_do_not_raise_the_share():
    rng = np.random.default_rng(1)
    shares, covered = [], []
    for _ in range(60):
        effect = rng.normal(0, 0.3, (1, 40))
        distances_ = np.exp(effect + rng.normal(0, 0.3, (80, 40)))
        shares.append(share_nearer(distances_[:, :30], distances_[:, 30:]))
        low, high = share_interval(distances_[:, :30], distances_[:, 30:], 0)
        covered.append(low <= 0.5 <= high)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.mean(covered) > 0.85


def test_patients_of_another_vendor_are_no_rivals():
    to_training = np.array([[0.5, np.inf], [np.inf, 0.1]])
    to_held_out = np.array([[0.7, np.inf], [np.inf, 0.05]])
    assert share_nearer(to_training, to_held_out) == 0.5


def test_mirrored_rings_are_reversed_rings(training):
    flipped = replace(training, images=training.images.flip(-1), masks=training.masks.flip(-1))
    expected = rings(training, mirrored=True).roll(32, -1)  # a left-right flip is a reversal and half a turn
    torch.testing.assert_close(rings(flipped), expected, atol=2e-3, rtol=0)


def test_the_nearest_pairs_are_drawn(tmp_path, training, held_out, fresh):
    part = (fresh, training, held_out, compare(fresh, training), compare(fresh, held_out))
    draw_pairs(tmp_path / "pairs.png", [part])
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
