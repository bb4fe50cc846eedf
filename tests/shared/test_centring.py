"""The public segmenter brings the ventricle to the middle, wherever the crop put it."""

import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.shared.case import LV, MYO
from fedcmr.shared.tasks.ejection_fraction.centring import centred, ventricles


def hearts_off_the_middle(num: int = 4):
    rng = torch.Generator().manual_seed(11)
    hearts = draw_hearts(num, rng, 6)
    d = distances(hearts, slice_positions(hearts, 6))
    images, masks = render(hearts, d, rng), masks_from(d)
    return images[:, 1:5], masks[:, 1:5]


def centroid(lv: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a mask's centre from the middle of the image, by plain sums."""
    rows, columns = torch.nonzero(lv.sum(dim=(0, 1)) > 0, as_tuple=True)
    return torch.stack([rows.float().mean(), columns.float().mean()]) - 31.5


def test_the_ventricle_comes_to_the_middle():
    images, masks = hearts_off_the_middle()
    # The masks go along as a second image pair would: shifted by what was found in the images.
    for stack, labels, moved in zip(images, masks, centred(list(images)), strict=True):
        before = centroid(labels == LV)
        down, right = before.round().int().tolist()
        found = [
            (abs(dy - down) + abs(dx - right))
            for dy in range(-16, 17)
            for dx in range(-16, 17)
            if torch.equal(moved[:, :, 20:44, 20:44], stack.roll((-dy, -dx), (2, 3))[:, :, 20:44, 20:44])
        ]
        assert found and min(found) <= 3


def test_a_shifted_scan_is_centred_on_the_same_heart():
    images, _ = hearts_off_the_middle(2)
    shifted = images.roll((4, -3), (3, 4))
    for one, other in zip(centred(list(images)), centred(list(shifted)), strict=True):
        inner = (slice(None), slice(None), slice(20, 44), slice(20, 44))
        best = min(
            (one[inner] - other.roll((dy, dx), (2, 3))[inner]).abs().mean() for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        )
        assert best < 0.02


def test_of_several_finds_the_one_in_muscle_counts():
    grid = torch.arange(64) - 31.5
    labels = torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    heart, vessel = (torch.hypot(grid[:, None] - y, grid - x) for y, x in ((-8, 5), (15, -14)))
    labels[:, :, heart < 10] = MYO
    labels[:, :, heart < 6] = LV
    labels[:, 0, vessel < 9] = LV
    found = ventricles(labels)
    assert torch.equal(found[0, 0], heart < 6) and torch.equal(found[0, 1], heart < 6)
    assert not ventricles(torch.where(labels == MYO, 0, labels)).any()


def test_images_without_a_heart_stay_as_they_are():
    blank = [torch.full((3, 2, 64, 64), -0.8), torch.full((2, 2, 64, 64), -0.8)]
    for before, after in zip(blank, centred(blank), strict=True):
        assert torch.equal(before, after)
    assert centred([]) == []
