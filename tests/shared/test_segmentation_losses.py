"""The losses of a segmenter against plain formulas, and what is not drawn counts as what it may be."""

import itertools
import math

import pytest
import torch

from fedcmr.server.settings import SEGMENTATION_LOSSES
from fedcmr.shared.case import LV, MYO, NOT_DRAWN
from fedcmr.shared.tasks.segmentation.losses import FINAL, LOSSES, SegmentationLoss, moving


def batch(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 8, generator=rng), torch.randint(4, (3, 8, 8), generator=rng).to(torch.uint8)


def test_settings_name_the_losses_that_there_are():
    assert set(SEGMENTATION_LOSSES) == set(LOSSES)


def test_each_loss_alone_is_its_formula():
    logits, masks = batch()
    likely = logits.softmax(1)
    of_label = torch.stack([likely[n, int(masks[n, y, x]), y, x] for n in range(3) for y in range(8) for x in range(8)])
    loss = SegmentationLoss(LOSSES["cross_entropy"])
    assert loss(logits, masks, 0.3).item() == pytest.approx(-of_label.log().mean().item(), rel=1e-5)
    dice = [
        2 * likely[:, label][masks == label].sum() / (likely[:, label].sum() + (masks == label).sum())
        for label in (1, 2, 3)
    ]
    expected = 1 - sum(value.item() for value in dice) / 3
    assert SegmentationLoss(LOSSES["dice"])(logits, masks, 0.3).item() == pytest.approx(expected, rel=1e-4)
    fixed = SegmentationLoss(LOSSES["fixed"])(logits, masks, 0.9).item()
    assert fixed == pytest.approx((expected - of_label.log().mean().item()) / 2, rel=1e-4)


def test_the_moving_weights_go_from_cross_entropy_to_dice_and_add_up_to_one():
    assert moving(0.0) == (1.0, 0.0) and moving(1.0) == pytest.approx((1 - FINAL, FINAL))
    weights = [moving(step / 50) for step in range(51)]
    assert all(math.isclose(first + second, 1) for first, second in weights)
    assert all(before[1] <= after[1] for before, after in itertools.pairwise(weights))


def test_an_undrawn_pixel_may_be_what_is_not_drawn_in_its_image_and_nothing_else():
    masks = torch.full((1, 4, 4), NOT_DRAWN, dtype=torch.uint8)
    masks[0, :2] = LV
    masks[0, 2] = MYO
    loss = SegmentationLoss(LOSSES["cross_entropy"])
    sure = torch.full((1, 4, 4, 4), -30.0)
    sure[0, LV, :2] = sure[0, MYO, 2] = 30.0
    for label, allowed in ((0, True), (1, True), (MYO, False), (LV, False)):
        logits = sure.clone()
        logits[0, label, 3] = 30.0
        value = loss(logits, masks, 0.0).item()
        assert (value < 1e-6) == allowed, label


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_images_that_nobody_drew_teach_nothing(name):
    logits = torch.randn(2, 4, 8, 8, requires_grad=True)
    SegmentationLoss(LOSSES[name])(logits, torch.full((2, 8, 8), NOT_DRAWN, dtype=torch.uint8), 0.7).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


def test_the_way_of_equal_time_gives_the_same_loss():
    logits, masks = batch()
    for weights in LOSSES.values():
        quick, equal = (SegmentationLoss(weights, equal_time)(logits, masks, 0.5) for equal_time in (False, True))
        assert float(quick) == pytest.approx(float(equal), rel=1e-6)
