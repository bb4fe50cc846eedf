"""How much of a cavity is dark, counted on pictures whose darkness is known."""

import math

import numpy as np
import pytest
import torch

from fedcmr.shared.case import LV, MYO, NOT_DRAWN
from fedcmr.shared.trabeculae import dark_shares, grey_levels


def heart(dark: tuple[float, float], blood: float = 0.6, muscle: float = -0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """One heart of three slices: a square cavity of 400 pixels in muscle, of which a share is dark at ED and ES."""
    masks = torch.zeros(1, 3, 2, 40, 40, dtype=torch.uint8)
    masks[..., 5:35, 5:35], masks[..., 10:30, 10:30] = MYO, LV
    images = torch.full(masks.shape, -0.9)
    images[masks == MYO] = muscle
    for phase, share in enumerate(dark):
        values = torch.full((3, 400), blood)
        values[:, : round(400 * share)] = muscle
        images[0, :, phase, 10:30, 10:30] = values.reshape(3, 20, 20)
    return images, masks


@pytest.mark.parametrize("dark", [(0.0, 0.0), (0.2, 0.45), (0.1, 0.7)])
def test_the_share_is_counted(dark):
    np.testing.assert_allclose(dark_shares(*heart(dark))[0], dark, atol=1e-6)
    images, masks = heart(dark)
    np.testing.assert_allclose(dark_shares(images * 0.5 + 0.2, masks)[0], dark, atol=1e-6)  # whatever the contrast


def test_muscle_that_was_drawn_at_one_phase_serves_both():
    images, masks = heart((0.2, 0.4))
    masks[:, :, 1][masks[:, :, 1] == MYO] = NOT_DRAWN
    np.testing.assert_allclose(dark_shares(images, masks)[0], (0.2, 0.4), atol=1e-6)
    assert grey_levels(images[0], masks[0])[1] == pytest.approx((0.6, -0.4))


def test_what_is_not_there_has_no_share():
    images, masks = heart((0.2, 0.4))
    masks[masks == MYO] = NOT_DRAWN
    assert dark_shares(images, masks).isnan().all()
    images, masks = heart((0.2, 0.4))
    masks[:, :, 1] = 0
    ed, es = dark_shares(images, masks)[0].tolist()
    assert ed == pytest.approx(0.2) and math.isnan(es)
