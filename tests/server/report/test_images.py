"""Which patients the report shows, on cases invented here."""

import math

import numpy as np
import pytest

from fedcmr.server.report.images import NUM_EXTREMES, NUM_SAMPLES, NUM_SLICES, extremes, sample_sheets
from fedcmr.shared.case import Case, CaseInfo


def case(vendor: str, ef: float, shade: float = 0.5, num_slices: int = 6) -> Case:
    """Slice k of the stack has brightness `shade` + k / 100, and its mask is empty."""
    frames = np.full((2, num_slices, 64, 64), shade, np.float32) + np.arange(num_slices)[:, None, None] / 100
    info = CaseInfo(f"secret-{vendor}-{ef:.3f}", vendor, 1.5, ef, "secret-group")
    spacing_mm = np.array([8, 2, 2], np.float32)
    return Case(info, frames.astype(np.float32), np.zeros(frames.shape, np.uint8), spacing_mm)


def test_every_vendor_gets_real_patients_over_the_range_and_synthetic_ones_of_similar_values():
    real = [case(vendor, 0.20 + i / 20) for vendor in ("GE", "Philips") for i in range(9)]
    synthetic = [case(vendor, ef) for vendor in ("GE", "Philips") for ef in np.linspace(0.08, 0.8, 60)]
    sheets = sample_sheets(synthetic, real)
    assert list(sheets) == ["GE", "Philips"]
    for sheet in sheets.values():
        assert sheet.real.images.shape == sheet.synthetic.images.shape == (NUM_SAMPLES, 2, 64, 64)
        assert sheet.real.efs == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
        assert sheet.synthetic.efs == pytest.approx(sheet.real.efs, abs=0.72 / 59)


def test_the_same_grey_means_the_same_in_both_rows():
    sheet = sample_sheets([case("GE", 0.5, shade=0.3)], [case("GE", 0.5, shade=0.3)])["GE"]
    np.testing.assert_allclose(sheet.real.images, 0.33, atol=1e-6)  # the middle of the six slices
    np.testing.assert_array_equal(sheet.synthetic.images, sheet.real.images)


def test_a_synthetic_patient_stands_in_one_column_only():
    sheet = sample_sheets([case("GE", ef) for ef in (0.3, 0.31, 0.5)], [case("GE", 0.3), case("GE", 0.3)])["GE"]
    assert sorted(sheet.synthetic.efs) == [0.3, 0.31]


def test_few_or_no_patients_are_no_trouble():
    alone = sample_sheets([case("GE", 0.4)], [])["GE"]
    assert alone.real is None and alone.synthetic.efs == [0.4]
    more_real = sample_sheets([case("GE", 0.4)], [case("GE", 0.2), case("GE", 0.6)])["GE"]
    assert more_real.synthetic.efs == [0.4, 0.4] and more_real.real.efs == [0.2, 0.6]
    assert sample_sheets([], [case("GE", 0.4)]) == {}
    unknown = sample_sheets([case("GE", 0.4)], [case("GE", math.nan)])["GE"]
    assert unknown.real is None


def test_best_and_worst_are_by_absolute_error_and_disjoint():
    cases = [case("GE", 0.5) for _ in range(6)] + [case("Philips", 0.3) for _ in range(6)]
    errors = [0.01, -0.2, 0.05, 0.0, 0.3, -0.02, 0.11, -0.12, 0.13, -0.14, 0.15, -0.5]
    best, worst = extremes(cases, [c.info.ef + e for c, e in zip(cases, errors, strict=True)])
    assert [round(e.predicted - e.true, 3) for e in best] == [0.0, 0.01, -0.02, 0.05]
    assert [round(e.predicted - e.true, 3) for e in worst] == [-0.5, 0.3, -0.2, 0.15]
    assert [e.vendor for e in worst] == ["Philips", "GE", "GE", "Philips"] and len(best) == NUM_EXTREMES
    assert all(e.images.shape == (NUM_SLICES, 2, 64, 64) for e in (*best, *worst))


@pytest.mark.parametrize("num", [0, 1, 2, 3, 5])
def test_nobody_is_both_best_and_worst(num):
    cases = [case("GE", 0.1 * (i + 1), shade=i / 10, num_slices=1) for i in range(num)]
    best, worst = extremes(cases, [0.1] * num)
    assert len(best) == len(worst) == num // 2
    assert not {e.true for e in best} & {e.true for e in worst}


def test_a_prediction_that_is_not_finite_is_neither_best_nor_worst():
    best, worst = extremes([case("GE", 0.5)] * 3, [0.5, math.nan, 0.1])
    assert [best[0].predicted, worst[0].predicted] == [0.5, 0.1]


def test_predictions_of_other_patients_are_not_shown():
    with pytest.raises(ValueError, match="one prediction per patient"):
        extremes([case("GE", 0.5)], [])


def test_images_carry_no_name():
    sheet = sample_sheets([case("GE", 0.5)], [case("GE", 0.5)])["GE"]
    best, worst = extremes([case("GE", 0.5)] * 2, [0.5, 0.1])
    shown = repr((sheet.real.efs, sheet.synthetic.efs, *(vars(e).keys() for e in (*best, *worst)), best, worst))
    assert "secret" not in shown
