"""From a case to the networks' images: geometry in millimetres, masks stay labels."""

import numpy as np
import pytest
import torch

from fedcmr.shared import views
from fedcmr.shared.case import LV, NOT_DRAWN, Case, CaseInfo
from fedcmr.shared.views import (
    IMAGE_SIZE,
    PIXEL_MM,
    augment,
    augment_in_equal_time,
    drawn_whole,
    slice_pairs,
    with_heart,
)


def disc_case(size: int, pixel_mm: float, radius_mm: float, centre_mm=(0.0, 0.0)) -> Case:
    axis = (np.arange(size) - (size - 1) / 2) * pixel_mm
    inside = np.hypot(axis[:, None] - centre_mm[0], axis[None] - centre_mm[1]) < radius_mm
    masks = np.broadcast_to(inside * np.uint8(LV), (2, 3, size, size)).copy()
    frames = (masks > 0).astype(np.float32)
    return Case(CaseInfo("p", "GE", 1.5, 0.5, "p"), frames, masks, np.array([10, pixel_mm, pixel_mm], np.float32))


@pytest.mark.parametrize(("size", "pixel_mm"), [(96, 1.5), (64, 2.0), (120, 1.2)])
def test_a_disc_keeps_its_place_and_area_in_millimetres(size, pixel_mm):
    images, masks = slice_pairs(disc_case(size, pixel_mm, 25, (10, -14)))
    assert images.shape == masks.shape == (3, 2, IMAGE_SIZE, IMAGE_SIZE)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    area_mm2 = (masks[0, 0] == LV).sum().item() * PIXEL_MM**2
    assert area_mm2 == pytest.approx(np.pi * 25**2, rel=0.03)
    rows, columns = torch.nonzero(masks[0, 0] == LV, as_tuple=True)
    centre = (IMAGE_SIZE - 1) / 2
    assert (rows.float().mean().item() - centre) * PIXEL_MM == pytest.approx(10, abs=0.5)
    assert (columns.float().mean().item() - centre) * PIXEL_MM == pytest.approx(-14, abs=0.5)


def test_a_case_on_the_networks_grid_passes_unchanged():
    case = disc_case(64, 2.0, 20)
    images, masks = slice_pairs(case)
    np.testing.assert_allclose(images[:, 0].numpy(), case.frames[0] * 2 - 1, atol=1e-5)
    np.testing.assert_array_equal(masks[:, 1].numpy(), case.masks[1])


def test_augmentation_moves_image_and_mask_together():
    images, masks = slice_pairs(disc_case(96, 1.5, 25, (8, 0)))
    moved, labels = augment(images, masks, torch.Generator().manual_seed(1))
    assert not torch.equal(labels, masks)
    agreement = ((moved > 0) == (labels == LV)).float().mean()
    assert agreement > 0.98
    assert set(labels.unique().tolist()) <= {0, LV}


def test_augmentation_follows_its_generator():
    images, masks = slice_pairs(disc_case(96, 1.5, 25))
    first = augment(images, masks, torch.Generator().manual_seed(4))
    again = augment(images, masks, torch.Generator().manual_seed(4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_with_heart_looks_at_diastole():
    masks = torch.zeros(3, 2, 8, 8, dtype=torch.uint8)
    masks[1, 0, 4, 4] = LV
    masks[2, 1, 4, 4] = LV
    assert with_heart(masks).tolist() == [False, True, False]


def test_beyond_the_edge_of_a_frame_that_is_drawn_in_part_nothing_is_known():
    case = disc_case(48, 1.5, 15)  # 72 of the 128 mm
    case.masks[1][case.masks[1] == 0] = NOT_DRAWN
    images, masks = slice_pairs(case)
    assert masks[0, 0, 0, 0] == 0 and masks[0, 1, 0, 0] == NOT_DRAWN
    assert set(masks[:, 1].unique().tolist()) == {LV, NOT_DRAWN} and set(masks[:, 0].unique().tolist()) == {0, LV}
    _, moved = augment(images, masks, torch.Generator().manual_seed(1), max_shift_px=30)
    assert not (moved[:, 0] == NOT_DRAWN).any() and not (moved[:, 1] == 0).any()
    assert not drawn_whole(masks).any() and drawn_whole(masks[:, :1]).all()


def test_a_slice_holds_the_heart_if_end_systole_shows_it_where_end_diastole_is_not_drawn():
    _, masks = slice_pairs(disc_case(96, 1.5, 20))
    masks[0, 0], masks[1, 0] = 0, NOT_DRAWN
    assert with_heart(masks).tolist() == [False, True, True]


def test_views_in_equal_time_are_those_of_augment_and_no_mask_of_them_goes_its_longer_way(monkeypatch):
    """Its own way for masks drawn in part would make their patients' gradients longer by a tenth."""
    images, whole = slice_pairs(disc_case(96, 1.5, 25, (8, 0)))
    part = torch.where((whole == LV) | (torch.arange(len(whole)) % 2 == 0)[:, None, None, None], whole, NOT_DRAWN)
    seen = []
    monkeypatch.setattr(views, "augment", lambda *given: seen.append(given[1]) or augment(*given))
    for masks in (whole, part):
        expected = augment(images, masks, torch.Generator().manual_seed(5))
        found = augment_in_equal_time(images, masks, torch.Generator().manual_seed(5))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(seen) == 2 and not any((masks == NOT_DRAWN).any() for masks in seen)
