import numpy as np
import pytest
from scipy.stats import spearmanr
from statsmodels.stats.proportion import proportion_confint

from fedcmr.server.evaluation.coverage import NOMINAL, coverage


def test_coverage_counts_patients_inside_normal_intervals():
    rng = np.random.default_rng(0)
    true, sd = rng.uniform(0.2, 0.7, 60), rng.uniform(0.02, 0.08, 60)
    predicted = true + rng.normal(0, 1.3 * sd)
    figures = coverage(true, predicted, sd)
    z = {0.5: 0.67449, 0.68: 0.99446, 0.8: 1.28155, 0.9: 1.64485, 0.95: 1.95996}
    for row in figures["coverage"]:
        inside = sum(abs(p - t) <= z[row["nominal"]] * s for p, t, s in zip(predicted, true, sd, strict=True))
        assert row["observed"] == inside / 60
        assert row["ci95"] == pytest.approx(proportion_confint(inside, 60, method="beta"), abs=1e-9)
    assert [row["nominal"] for row in figures["coverage"]] == list(NOMINAL)
    assert figures["mean_sd_points"] == pytest.approx(100 * sd.mean())
    assert figures["rank_correlation"] == pytest.approx(spearmanr(sd, abs(predicted - true))[0])


def test_patients_of_whom_something_is_unknown_are_left_out():
    figures = coverage([0.5, np.nan, 0.5, 0.5], [0.5, 0.5, np.nan, 0.6], [0.05, 0.05, 0.05, 0.05])
    assert figures["n_patients"] == 2 and figures["rank_correlation"] is None
    assert coverage([0.5], [np.nan], [0.1]) is None


def test_equal_doubts_have_no_rank():
    assert coverage([0.5, 0.4, 0.3], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1])["rank_correlation"] is None
