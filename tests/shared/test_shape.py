"""Shape vectors against closed forms: stacks of discs and ellipses whose measures are known."""

import math

import numpy as np
import pytest
import torch

from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, load_cases
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.shape import (
    EXPECTED,
    GEOMETRY_NAMES,
    MAX_SHAPE,
    SHAPE_NAMES,
    SPREAD,
    case_shape,
    geometry_vectors,
    standardise_shapes,
)
from fedcmr.shared.trabeculae import dark_shares
from fedcmr.shared.views import slice_pairs

SIZE, PIXEL_MM, SLICE_MM = 128, 1.0, 8.0
RADII = {ED: (22, 24, 24, 22, 20, 16), ES: (16, 17, 17, 14, 10, 0)}
WALLS = {ED: 8.0, ES: 12.0}
"""Millimetres, of six slices from base to apex; the apex closes at end-systole."""


def stack(pixel_mm: float = PIXEL_MM, axes: tuple[float, float] = (1.0, 1.0), thick: float = 0.0) -> np.ndarray:
    """Masks (2, 6, 128, 128) of discs in rings, with a right ventricle on the left of the first four slices.

    Args:
        pixel_mm: In-plane pixel.
        axes: Factors of rows and columns.
        thick: Millimetres that the ring is thicker on the right ventricle's side.
    """
    places = (np.arange(SIZE) - (SIZE - 1) / 2) * pixel_mm
    y, x = places[:, None] / axes[0], places[None] / axes[1]
    radius = np.hypot(y, x)
    masks = np.zeros((2, 6, SIZE, SIZE), np.uint8)
    for phase, slice_number in np.ndindex(2, 6):
        cavity, labels = RADII[phase][slice_number], masks[phase, slice_number]
        if slice_number < 4:
            labels[np.hypot(y, x + 40) < (20 if phase == ED else 15)] = RV
        facing = (-x / np.maximum(radius, 1e-9)) > math.sqrt(0.5)
        labels[radius < cavity + WALLS[phase] + thick * facing] = MYO
        labels[radius < cavity] = LV
    return masks


def vector(masks: np.ndarray, spacing=(SLICE_MM, PIXEL_MM, PIXEL_MM)) -> dict[str, float]:
    raw = geometry_vectors(torch.from_numpy(np.ascontiguousarray(masks))[None], torch.tensor([spacing]))[0]
    return dict(zip(GEOMETRY_NAMES, raw.tolist(), strict=True))


def test_entries_are_what_geometry_says():
    found = vector(stack())
    ed, es = (np.array(RADII[phase], float) for phase in (ED, ES))
    assert found["lv_radius"] == pytest.approx(math.log(24), abs=0.01)
    assert found["lv_length"] == pytest.approx(math.log(6 * 8), abs=1e-6)
    assert found["fullness"] == pytest.approx(ed.mean() / 24, abs=0.01)
    assert found["ellipticity"] == pytest.approx(0, abs=0.01)
    assert found["wall"] == pytest.approx(math.log(8), abs=0.03)
    assert found["wall_taper"] == pytest.approx(0, abs=0.03)
    assert found["septum"] == pytest.approx(0, abs=0.05)
    assert found["thickening"] == pytest.approx(math.log(12 / 8), abs=0.03)
    assert found["shortening"] == pytest.approx(1 / 6, abs=1e-6)
    basal, apical = (1 - (es[part] ** 2).sum() / (ed[part] ** 2).sum() for part in (slice(3), slice(3, 6)))
    assert found["apical_emptying"] == pytest.approx(apical - basal, abs=0.01)
    assert found["rv_extent"] == pytest.approx(math.log(4 / 6), abs=1e-6)


def test_a_longer_axis_and_a_thicker_septum_are_seen():
    assert vector(stack(axes=(1.2, 1.0)))["ellipticity"] == pytest.approx(math.log(1.2), abs=0.01)
    inner, outer = 22.0, 30.0
    wanted = math.log(((outer + 4) ** 2 - inner**2) / (outer**2 - inner**2))
    assert vector(stack(thick=4.0))["septum"] == pytest.approx(wanted, abs=0.1)
    assert vector(stack(thick=4.0))["wall"] > vector(stack())["wall"]


def test_the_right_ventricle_is_measured_by_its_volume():
    masks = stack()
    volumes = {label: [int((masks[phase] == label).sum()) for phase in (ED, ES)] for label in (RV, MYO, LV)}
    found = vector(masks)
    assert found["rv_emptying"] == pytest.approx(1 - volumes[RV][ES] / volumes[RV][ED])
    assert found["rv_size"] == pytest.approx(math.log(volumes[RV][ED] / (volumes[LV][ED] + volumes[MYO][ED])))


@pytest.mark.parametrize(
    "changed",
    [
        lambda masks: masks[:, ::-1],
        lambda masks: np.rot90(masks, axes=(2, 3)),
        lambda masks: masks[..., ::-1],
        lambda masks: np.roll(masks, (5, 3), axis=(2, 3)),
        lambda masks: np.pad(masks, ((0, 0), (1, 2), (0, 0), (0, 0))),
    ],
    ids=["apex first", "turned", "mirrored", "moved", "with empty slices"],
)
def test_a_heart_keeps_its_shape_however_it_lies(changed):
    masks = stack(thick=3.0)
    expected, found = vector(masks), vector(changed(masks))
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_heart_keeps_its_shape_on_another_grid():
    coarse = vector(stack(1.5), (SLICE_MM, 1.5, 1.5))
    assert coarse == pytest.approx(vector(stack()), abs=0.06)


def test_an_apex_first_stack_without_a_right_ventricle_is_turned_too():
    masks = np.where(stack() == RV, 0, stack()).astype(np.uint8)
    expected, found = vector(masks), vector(masks[:, ::-1])
    assert found["wall_taper"] == pytest.approx(expected["wall_taper"], abs=1e-6)
    assert found["apical_emptying"] == pytest.approx(expected["apical_emptying"], abs=1e-6)


def test_what_nobody_drew_is_not_known_and_the_rest_is():
    masks = stack()
    unknown = (masks == RV) | (masks == 0)
    partial = np.where(unknown, NOT_DRAWN, masks).astype(np.uint8)
    partial[ES][partial[ES] == MYO] = NOT_DRAWN
    found, whole = vector(partial), vector(masks)
    lost = {"septum", "thickening", "rv_size", "rv_emptying", "rv_extent"}
    assert {name for name, value in found.items() if math.isnan(value)} == lost
    assert all(found[name] == pytest.approx(whole[name]) for name in set(GEOMETRY_NAMES) - lost)


def test_too_few_slices_have_no_shape():
    masks = np.zeros((2, 6, SIZE, SIZE), np.uint8)
    assert all(map(math.isnan, vector(masks).values()))
    masks[:, 2:4] = stack()[:, 2:4]
    assert all(map(math.isnan, vector(masks).values()))


def test_a_standardised_vector_is_relative_to_the_ejection_fraction():
    raw = torch.tensor(EXPECTED[0], dtype=torch.float64) + 0.2 * torch.tensor(EXPECTED[1], dtype=torch.float64)
    raw += 0.04 * torch.tensor(EXPECTED[2], dtype=torch.float64)
    np.testing.assert_allclose(standardise_shapes(raw[None], torch.tensor([0.7])), 0, atol=1e-6)
    away = raw + 2 * torch.tensor(SPREAD, dtype=torch.float64)
    np.testing.assert_allclose(standardise_shapes(away[None], torch.tensor([0.7])), 2, atol=1e-6)
    far = raw + 50 * torch.tensor(SPREAD, dtype=torch.float64)
    assert standardise_shapes(far[None], torch.tensor([0.7])).max() == MAX_SHAPE
    assert standardise_shapes(raw[None], torch.tensor([math.nan])).isnan().all()


def test_a_case_has_its_geometry_and_its_trabeculae(write_cases, tmp_path):
    write_cases(tmp_path, "GE", 1, seed=1)
    (case,) = load_cases(tmp_path)
    images, masks = slice_pairs(case)
    raw = geometry_vectors(torch.from_numpy(case.masks)[None], torch.from_numpy(case.spacing_mm)[None])
    raw = torch.cat([raw, dark_shares(images[None], masks[None]).double()], dim=1)
    found = case_shape(case, images, masks)
    assert found.shape == (len(SHAPE_NAMES),)
    expected = standardise_shapes(raw, torch.tensor([ejection_fraction(case.masks)]))[0].float()
    torch.testing.assert_close(found, expected, equal_nan=True)
