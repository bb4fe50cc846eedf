"""Saliency maps against closed forms, and on images where one place alone determines the prediction."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.server.tasks.ejection_fraction import saliency
from fedcmr.server.tasks.ejection_fraction.saliency import (
    attribute,
    saliency_maps,
    saliency_share,
    score_attributions,
    study_attributions,
)
from fedcmr.shared.case import LV, Case, CaseInfo
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.tasks.ejection_fraction.centring import centred_with_masks
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, save_regressor


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


def left_square(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with two bright squares, one left and one right: the left one's brightness is the target, shape (num,)."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 2, 64, 64, generator=rng) * 0.05 - 0.5
    shades = torch.rand(num, 2, generator=rng)
    for column, shade in zip((8, 44), shades.T, strict=True):
        images[:, :, 26:38, column : column + 12] = (1.5 * shade - 0.5)[:, None, None, None]
    return images, shades[:, 0]


@pytest.fixture(scope="module")
def left_model() -> Regressor:
    """A ResNet50 that has learnt to use the left square and to ignore the right one."""
    torch.manual_seed(0)
    model = Regressor().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(30):
        images, ef = left_square(12, seed=step)
        loss = (model(images.contiguous(memory_format=torch.channels_last)).ef - ef).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_map_of_a_linear_network_is_what_every_cell_adds():
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.randn(70, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    added = images.reshape(70, 2, 16, 4, 16, 4).mean(dim=(1, 3, 5)) * weights
    rough = nn.functional.interpolate(added.abs()[:, None], (64, 64), mode="bilinear")[:, 0].numpy()
    kernel = np.exp(-(np.arange(-16, 17) ** 2) / (2 * saliency.SMOOTHING_PX**2))
    padded = np.pad(rough, ((0, 0), (16, 16), (16, 16)), mode="symmetric")
    for axis in (1, 2):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), mode="valid")
    np.testing.assert_allclose(saliency_maps(linear_model(weights), images), padded, rtol=0.03)


def test_what_lowers_the_prediction_counts_like_what_raises_it():
    weights = torch.ones(16, 16)
    images = torch.rand(2, 2, 64, 64)
    up, down = (saliency_maps(linear_model(sign * weights), images) for sign in (1, -1))
    torch.testing.assert_close(up, down)
    assert up.min() > 0


@pytest.mark.slow
def test_the_map_of_a_network_that_uses_one_place_lies_there(left_model):
    images, ef = left_square(24, seed=1000)
    with torch.inference_mode():
        assert np.corrcoef(left_model(images).ef, ef)[0, 1] > 0.9, "the network has not learnt what it was taught"
    maps = saliency_maps(left_model, images)
    left, right = (maps[:, 20:44, column : column + 24].mean() for column in (2, 38))
    assert left > 3 * right
    assert maps[:, :, :32].sum() > 0.75 * maps.sum()


def test_maps_move_with_the_image():
    images = torch.randn(3, 2, 64, 64, generator=torch.Generator().manual_seed(2))
    still, moved = (saliency_maps(linear_model(torch.ones(16, 16)), x) for x in (images, images.roll((8, -4), (2, 3))))
    torch.testing.assert_close(moved.roll((-8, 4), (1, 2))[:, 24:40, 24:40], still[:, 24:40, 24:40], rtol=0.05, atol=0)


@pytest.mark.slow
def test_maps_leave_the_network_as_it_was(left_model):
    images, _ = left_square(2, seed=1)
    with torch.inference_mode():
        before = left_model(images).ef
    for parameter in left_model.parameters():
        parameter.grad = None
    with torch.no_grad():
        saliency_maps(left_model, images)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in left_model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in left_model.modules())
    with torch.inference_mode():
        assert torch.equal(left_model(images).ef, before)


def test_a_uniform_map_has_the_share_of_the_area():
    masks = torch.zeros(3, 2, 64, 64, dtype=torch.uint8)
    masks[0, 0, :16, :32], masks[1, 1, :32, :16], masks[1, 0, :16, :16] = 3, 1, 2
    in_heart, area = saliency_share(torch.full((3, 64, 64), 0.7), masks)
    assert area == pytest.approx((16 * 32 + 32 * 16) / (3 * 64 * 64))
    assert in_heart == pytest.approx(area, rel=1e-5)


def test_share_is_that_of_the_weights_inside_either_phase():
    maps, masks = torch.zeros(1, 64, 64), torch.zeros(1, 2, 64, 64, dtype=torch.uint8)
    masks[0, 0, 0, 0], masks[0, 1, 0, 1] = 1, 2
    maps[0, 0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert saliency_share(maps, masks)[0] == pytest.approx(0.3)
    assert all(math.isnan(share) for share in saliency_share(maps, torch.zeros_like(masks)))
    assert math.isnan(saliency_share(torch.zeros_like(maps), masks)[0])


def test_masks_go_along_with_the_images():
    images, labels = saliency.slice_pairs(hearts(1)[0])
    shifted, masks = centred_with_masks([images.roll((6, -9), (2, 3))], [labels.roll((6, -9), (2, 3))])
    lv = (masks[0] == LV).sum(dim=(0, 1)).float()
    axis = torch.arange(64) - 31.5
    assert abs(float(lv.sum(1) @ axis / lv.sum())) < 3 and abs(float(lv.sum(0) @ axis / lv.sum())) < 3
    # Bright blood must still lie under the label: a shift of the one without the other would mix it with muscle.
    assert float(shifted[0][masks[0] == LV].mean()) == pytest.approx(float(images[labels == LV].mean()), abs=0.05)


def test_masks_are_not_mirrored_at_the_border():
    images, labels = saliency.slice_pairs(hearts(1)[0])
    full = torch.full_like(labels, 2)
    _, (masks,) = centred_with_masks([images.roll((6, -9), (2, 3))], [full])
    assert (masks == 0).any() and set(masks.unique().tolist()) == {0, 2}
    assert centred_with_masks([], []) == ([], [])


def test_attributions_hold_the_shares_of_their_own_slices():
    cases = hearts(3)
    attributions = attribute(linear_model(torch.ones(16, 16)), cases)
    stacks, masks = saliency.centred_slices(cases)
    for case, found, stack, labels in zip(cases, attributions, stacks, masks, strict=True):
        maps = saliency_maps(linear_model(torch.ones(16, 16)), stack)
        assert (found.share_in_heart, found.area_share) == pytest.approx(saliency_share(maps, labels))
        assert (found.vendor, found.ef) == (case.info.vendor, case.info.ef)
        assert found.image.min() >= 0 and found.image.max() <= 1 and found.masks.shape == (2, 64, 64)
    assert attribute(linear_model(torch.ones(16, 16)), []) == []


def test_scores_are_means_over_patients_with_an_interval():
    one = attribute(linear_model(torch.ones(16, 16)), hearts(1))[0]
    shares = {"GE": [0.5, 0.7, 0.9], "Philips": [0.4], "Siemens": [math.nan]}
    attributions = [replace(one, vendor=v, share_in_heart=s, area_share=0.3) for v, row in shares.items() for s in row]
    scores = score_attributions({"synthetic": attributions}, num_bootstrap=500, seed=0)["synthetic"]
    assert list(scores) == ["GE", "Philips", "Siemens", "all"]
    assert scores["GE"]["share_in_heart"] == pytest.approx(0.7) and scores["GE"]["area_share"] == pytest.approx(0.3)
    assert 0.5 <= scores["GE"]["ci95"][0] < 0.7 < scores["GE"]["ci95"][1] <= 0.9
    assert scores["Philips"]["n_patients"] == 1 and scores["Philips"]["ci95"] is None
    assert scores["Siemens"] == {"n_patients": 0, "share_in_heart": None, "area_share": None, "ci95": None}
    assert scores["all"]["n_patients"] == 4 and scores["all"]["share_in_heart"] == pytest.approx(2.5 / 4)


@pytest.mark.slow
def test_a_study_attributes_some_patients_of_every_vendor_and_skips_those_without_masks(make_study, monkeypatch):
    run = make_study()
    cases = hearts(5)
    blank = replace(cases[0], masks=np.zeros_like(cases[0].masks))
    assert study_attributions(run, cases, []) == {}, "no regressor yet"
    save_regressor(run.path / "regressor.safetensors", Regressor())
    monkeypatch.setattr(saliency, "MAX_CASES", 2)
    attributions = study_attributions(run, cases, [("a", [blank]), ("b", [*cases[:1], blank])])
    assert {name: [one.vendor for one in found] for name, found in attributions.items()} == {
        "synthetic": ["GE", "GE", "Philips", "Philips"],
        "b": ["Philips"],
    }
    (run.path / "regressor.safetensors").write_bytes(b"of another version")
    assert study_attributions(run, cases, []) == {}
