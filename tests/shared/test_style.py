"""The public encoder reads off regions what a plain loop reads off them."""

import numpy as np
import pytest
import torch

from fedcmr.shared.case import LV, MYO, NOT_DRAWN, RV
from fedcmr.shared.style import STYLE_NAMES, StyleDistribution, regions, style_moments, style_vector


def patient(seed: int = 0):
    masks = torch.zeros(2, 2, 64, 64, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(64) - 32.0, torch.arange(64) - 32.0, indexing="ij")
    masks[:, :, (x + 18) ** 2 + y**2 < 100] = RV
    masks[:, :, x**2 + y**2 < 200] = MYO
    masks[:, :, x**2 + y**2 < 90] = LV
    levels = torch.tensor([-0.6, 0.2, -0.4, 0.7])
    images = levels[masks.long()] + 0.05 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(seed))
    return images, masks


def test_region_means_and_spreads_equal_numpys():
    images, masks = patient()
    vector = dict(zip(STYLE_NAMES, style_vector(images, masks).tolist(), strict=True))
    for name, label in (("lv", LV), ("myo", MYO), ("rv", RV)):
        values = images.numpy()[masks.numpy() == label]
        assert abs(vector[f"{name}_mean"] - values.mean()) < 1e-5
        if f"{name}_std" in vector:
            assert abs(vector[f"{name}_std"] - values.std()) < 1e-4


def test_the_noise_level_rises_with_noise_and_edge_sharpness_falls_with_blur():
    images, masks = patient()
    rough = style_vector(images + 0.2 * torch.randn(images.shape), masks)
    smooth = style_vector(torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2), masks)
    plain = style_vector(images, masks)
    noise, edge = STYLE_NAMES.index("noise_level"), STYLE_NAMES.index("edge_sharpness")
    assert rough[noise] > 2 * plain[noise]
    assert smooth[edge] < 0.7 * plain[edge]


def test_a_missing_region_is_nan_and_the_rest_is_not():
    images, masks = patient()
    masks[masks == RV] = 0
    vector = style_vector(images, masks)
    assert np.flatnonzero(torch.isnan(vector).numpy()).tolist() == [STYLE_NAMES.index("rv_mean")]


def test_samples_follow_the_distribution():
    num = len(STYLE_NAMES)
    correlation = torch.full((num, num), 0.6) + 0.4 * torch.eye(num)
    wanted = StyleDistribution(torch.linspace(-1, 1, num), torch.linspace(0.2, 0.4, num), correlation)
    drawn = wanted.sample(4000, torch.Generator().manual_seed(0))
    assert (drawn.mean(0) - wanted.mean).abs().max() < 0.03
    assert (drawn.std(0) - wanted.std).abs().max() < 0.03
    assert (torch.corrcoef(drawn.T) - correlation).abs().max() < 0.06


def test_moments_leave_out_a_patient_without_a_region():
    raw = torch.randn(60, len(STYLE_NAMES), generator=torch.Generator().manual_seed(1)) * 2 + 3
    broken = torch.cat([raw, torch.full((1, len(STYLE_NAMES)), float("nan"))])
    mean, std, correlation = style_moments(broken)
    np.testing.assert_allclose(mean, raw.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, raw.numpy().std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(
        correlation, 0.99 * np.corrcoef(raw.numpy().T) + 0.01 * np.eye(len(STYLE_NAMES)), atol=1e-5
    )
    twins = torch.cat([raw[:2], raw[:2]])  # fewer patients than entries: singular without the share of independence
    assert torch.linalg.eigvalsh(style_moments(twins)[2]).min() > 0


def test_what_nobody_drew_belongs_to_no_region_and_the_drawn_pixels_count_as_they_do_in_a_whole_mask():
    images, masks = patient()
    part = masks.clone()
    part[:, 0][part[:, 0] == RV] = 0
    part[:, 0][part[:, 0] == 0] = NOT_DRAWN  # end-diastole: cavity and muscle
    part[:, 1][part[:, 1] != LV] = NOT_DRAWN  # end-systole: the cavity alone
    assert all(not region[part == NOT_DRAWN].any() for region in regions(part))
    vector = dict(zip(STYLE_NAMES, style_vector(images, part).tolist(), strict=True))
    for name, label in (("lv", LV), ("myo", MYO)):
        values = images.numpy()[part.numpy() == label]
        assert abs(vector[f"{name}_mean"] - values.mean()) < 1e-5 and abs(vector[f"{name}_std"] - values.std()) < 1e-4
    unknown = {name for name, value in vector.items() if np.isnan(value)}
    assert unknown == {"rv_mean", "band_mean", "background_mean", "band_std", "background_std"}
    at_ed = dict(zip(STYLE_NAMES, style_vector(images[:, :1], masks[:, :1]).tolist(), strict=True))
    contrast = [values["lv_mean"] - values["myo_mean"] for values in (vector, at_ed)]
    # The cavity of a frame without muscle has no border: its edge is that of end-diastole.
    assert vector["edge_sharpness"] * contrast[0] == pytest.approx(at_ed["edge_sharpness"] * contrast[1], rel=1e-5)
