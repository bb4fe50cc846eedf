"""The ejection fraction of masks: by areas, over the whole stack, and undefined where a frame shows no ventricle."""

import math

import numpy as np
import pytest

from fedcmr.shared.case import ED, ES, LV, MYO
from fedcmr.shared.ejection_fraction import ejection_fraction


def masks(*areas: tuple[int, int]) -> np.ndarray:
    """Slices of so many pixels of LV at ED and at ES, muscle elsewhere."""
    stack = np.full((2, len(areas), 4, 4), MYO, np.uint8)
    for z, slice_areas in enumerate(areas):
        for phase, area in zip((ED, ES), slice_areas, strict=True):
            stack[phase, z].flat[:area] = LV
    return stack


def test_it_is_of_the_sums_over_the_stack_not_the_mean_over_its_slices():
    assert ejection_fraction(masks((10, 5), (2, 2))) == 1 - 7 / 12
    assert ejection_fraction(masks((10, 5), (2, 0))) == 1 - 5 / 12, "a slice may lose its cavity"


@pytest.mark.parametrize("areas", [(0, 0), (0, 3), (3, 0)])
def test_a_frame_without_a_ventricle_leaves_it_undefined(areas):
    assert math.isnan(ejection_fraction(masks(areas)))


def test_equal_areas_eject_nothing_and_larger_ones_at_es_less():
    assert ejection_fraction(masks((6, 6))) == 0 and ejection_fraction(masks((4, 6))) == -0.5
