"""Hearts: the masks eject what was requested, nest as hearts do, and cover sick and healthy shapes."""

import numpy as np
import pytest
import torch

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions, solve_contraction
from fedcmr.shared.case import ED, ES, LV, MYO
from fedcmr.shared.ejection_fraction import ejection_fraction

NUM_SLICES = 8


@pytest.fixture(scope="module")
def hearts():
    rng = torch.Generator().manual_seed(3)
    requested = torch.linspace(0.08, 0.80, 60)
    drawn = draw_hearts(60, rng, NUM_SLICES, requested)
    masks = masks_from(distances(drawn, slice_positions(drawn, NUM_SLICES)))
    return drawn, requested, masks


def test_masks_eject_what_was_asked(hearts):
    _, requested, masks = hearts
    got = np.array([ejection_fraction(stack.transpose(0, 1).numpy()) for stack in masks])
    assert np.abs(got - requested.numpy()).max() < 0.02
    assert np.corrcoef(got, requested)[0, 1] > 0.999


def test_ejection_fraction_equals_a_plain_loop():
    masks = np.random.default_rng(0).integers(0, 4, (2, 5, 12, 12)).astype(np.uint8)
    masks[ES, :, 6:] = 0
    areas = [0, 0]
    for phase in (ED, ES):
        for z in range(5):
            for y in range(12):
                for x in range(12):
                    areas[phase] += int(masks[phase, z, y, x] == LV)
    assert ejection_fraction(masks) == pytest.approx(1 - areas[1] / areas[0], abs=1e-12)
    assert np.isnan(ejection_fraction(np.zeros_like(masks)))


def test_the_cavity_lies_inside_muscle(hearts):
    _, _, masks = hearts
    cavity = masks == LV
    padded = torch.nn.functional.max_pool2d(cavity.flatten(0, 1).float(), 3, stride=1, padding=1).bool()
    around = padded.reshape(cavity.shape) & ~cavity
    inner = around.clone()
    inner[..., [0, -1], :] = False
    inner[..., :, [0, -1]] = False
    assert (masks[inner] == MYO).float().mean() > 0.995


def test_the_wall_keeps_its_volume_and_thickens(hearts):
    drawn, _, masks = hearts
    healthy = drawn.contraction < 0.75
    middle = masks[:, NUM_SLICES // 2]
    muscle = (middle == MYO).sum(dim=(-1, -2)).float()
    cavity = (middle == LV).sum(dim=(-1, -2)).float()
    thickness = ((cavity + muscle) / torch.pi).sqrt() - (cavity / torch.pi).sqrt()
    assert (thickness[healthy, ES] > thickness[healthy, ED]).all()


def test_diastolic_volumes_span_small_to_dilated(hearts):
    drawn, _, masks = hearts
    areas = (masks[:, :, ED] == LV).sum(dim=(1, 2, 3)).float()
    volumes_ml = areas * 4 * (drawn.length * 0.97 / NUM_SLICES) / 1000
    assert volumes_ml.min() > 30
    assert volumes_ml.min() < 110 < 220 < volumes_ml.max() < 600


def test_a_still_scar_gives_way_to_a_high_ejection_fraction():
    rng = torch.Generator().manual_seed(0)
    drawn = draw_hearts(20, rng, NUM_SLICES, torch.full((20,), 0.3))
    stiff = type(drawn)(**{**drawn.__dict__, "scar_severity": torch.ones(20), "scar_width": torch.full((20,), 1.4)})
    solved = solve_contraction(stiff, torch.full((20,), 0.75), NUM_SLICES)
    masks = masks_from(distances(solved, slice_positions(solved, NUM_SLICES)))
    got = [ejection_fraction(stack.transpose(0, 1).numpy()) for stack in masks]
    assert min(got) > 0.72
