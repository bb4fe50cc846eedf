"""The benchmark of what is found without masks: its figures, of patients made by hand."""

import math

import numpy as np
import pytest

from fedcmr.shared.case import ED, ES, LV, MYO
from fedcmr.simulations.benchmarks.contours import Found, summary, thickening


def stack(muscle_px: tuple[int, int]) -> np.ndarray:
    """Three slices with a cavity, and as many pixels of muscle at end-diastole and end-systole."""
    masks = np.zeros((2, 3, 20, 20), np.uint8)
    for phase in (ED, ES):
        masks[phase, :, 0, :5] = LV
        masks[phase].reshape(3, -1)[:, 100 : 100 + muscle_px[phase]] = MYO
    return masks


def test_thickening_is_of_the_slices_that_all_four_stacks_show():
    drawn, found = stack((100, 95)), stack((80, 120))
    drawn[ED, 0], found[ES, 2] = MYO, 0  # a slice without a cavity, and one that was not found
    assert thickening(drawn, found) == pytest.approx((0.95, 1.5))
    assert thickening(drawn, np.zeros_like(found)) is None


def test_distances_to_displaced_masks_and_of_unusable_scans_do_not_count():
    near = [Found(10.0, 2.0, float(mm), "", 1.0, thickening=(0.9, 1.2)) for mm in range(10)]
    far = Found(10.0, 11.0, 12.0, "auto-to-check", -3.0, thickening=(1.3, 1.4))
    displaced = Found(99.0, 99.0, 99.0, "", 1.0, displaced=True)
    unusable = Found(math.nan, None, None, "constant-image", None)
    row = summary([*near, far, displaced, unusable])
    expected = np.percentile([*range(10), 12], (50, 95))
    assert row["ventricle_mm"] == pytest.approx(
        dict(zip(("median", "p95"), expected, strict=True)) | {"max": 12, "far": 1}
    )
    assert row["heart_mm"]["far"] == 1 and row["motion_mm"]["max"] == 10
    assert (row["n_patients"], row["displaced"], row["n_kept"]) == (13, 1, 12)
    assert row["thickening"] == {"drawn": 0.9, "found": 1.2, "drawn_shrinks": pytest.approx(10 / 11, abs=1e-3)}
    assert summary([unusable])["ventricle_mm"] is None
