"""The maps show where an answer comes from: against closed forms, and on pictures where one place alone tells it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from server import saliency
from server.localisation import centred_with_masks
from server.regression import Regressor, save_regressor
from server.rendering import render
from server.saliency import look_at, saliency_maps, saliency_share, score_looks, study_looks
from shared.anatomy import distances, draw_hearts, ejection_fraction, masks_from, slice_positions
from shared.case import LV, Case, CaseInfo


class Linear(nn.Module):
    """A network whose logit is a known sum over the cells of its first stage: what each cell adds is plain."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(2, 1, 4, stride=4, bias=False)
        self.layer1.weight.data.fill_(1 / 32)
        self.register_buffer("weights", weights)

    def forward(self, images: Tensor) -> Tensor:
        logit = (self.layer1(images)[:, 0] * self.weights).sum(dim=(1, 2))
        return torch.stack([logit, 100 * images.mean(dim=(1, 2, 3))], 1)


def linear_model(weights: Tensor) -> Regressor:
    model = Regressor()
    model.network = Linear(weights)
    return model.eval()


def hearts(num: int = 3, ef: float = 0.5) -> list[Case]:
    """Rendered hearts with their masks, on the networks' grid."""
    rng = torch.Generator().manual_seed(3)
    drawn = draw_hearts(num, rng, 6, torch.full((num,), ef))
    d = distances(drawn, slice_positions(drawn, 6))
    images, masks = render(drawn, d, rng), masks_from(d)
    cases = []
    for i in range(num):
        labels = masks[i].transpose(0, 1).numpy()
        frames = ((images[i] + 1) / 2).clamp(0, 1).transpose(0, 1).numpy()
        info = CaseInfo(f"p{i}", "GE" if i % 2 else "Philips", 1.5, ejection_fraction(labels), f"p{i}")
        cases.append(Case(info, frames.copy(), labels.copy(), np.array([8, 2, 2], np.float32)))
    return cases


def told_by_one_place(num: int, places: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with two bright squares: the answer is the first one's brightness, the other one's is chance.

    Args:
        num: Of pictures.
        places: Shape (num, 2, 2): the squares' upper left corners.
        seed: Of brightness and noise.
    """
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 2, 64, 64, generator=rng) * 0.05 - 0.5
    shades = torch.rand(num, 2, generator=rng)
    for picture, corners, pair in zip(images, places.tolist(), shades, strict=True):
        for (row, column), shade in zip(corners, pair, strict=True):
            picture[:, row : row + 12, column : column + 12] = 1.5 * shade - 0.5
    return images, shades[:, 0]


LEFT, RIGHT = [26, 8], [26, 44]


@pytest.fixture(scope="module")
def left_reader() -> Regressor:
    """A ResNet50 that has learnt to read the left square and to pass over the right one."""
    torch.manual_seed(0)
    model = Regressor().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(40):
        images, ef = told_by_one_place(16, torch.tensor([[LEFT, RIGHT]] * 16), seed=step)
        loss = (model(images.contiguous(memory_format=torch.channels_last)).ef - ef).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_map_of_a_linear_network_is_what_every_cell_adds():
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.randn(70, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    added = images.reshape(70, 2, 16, 4, 16, 4).mean(dim=(1, 3, 5)) * weights
    expected = nn.functional.interpolate(added.abs()[:, None], (64, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(saliency_maps(linear_model(weights), images), expected, rtol=0.03, atol=1e-3)


def test_what_lowers_the_answer_counts_like_what_raises_it():
    weights = torch.ones(16, 16)
    images = torch.rand(2, 2, 64, 64)
    up, down = (saliency_maps(linear_model(sign * weights), images) for sign in (1, -1))
    torch.testing.assert_close(up, down)
    assert up.min() > 0
