"""Figures out of sums are those of the patients; with noise their intervals hold, or they are said to be unknown."""

import numpy as np
import pytest

from fedcmr.server.evaluation.from_sums import FIGURES, figures
from fedcmr.shared.tasks.ejection_fraction.sums import SUMS, PatientError, from_private, plain_table, private_table

NO_NOISE = np.zeros((len(SUMS), len(SUMS)))


def patients(num: int, seed: int = 0) -> list[PatientError]:
    """Ejection fractions of a ward, errors with a mean absolute value of about six points."""
    rng = np.random.default_rng(seed)
    true = np.clip(rng.normal(0.5, 0.15, num), 0.1, 0.9)
    return [
        PatientError("GE", t, t + e)
        for t, e in zip(true, np.clip(rng.normal(-0.02, 0.07, num), -0.3, 0.3), strict=True)
    ]


def test_figures_of_a_plain_table_are_numpy_s():
    group = patients(40)
    true, predicted = (np.array([getattr(p, name) for p in group]) for name in ("true", "predicted"))
    error = predicted - true
    found = figures(plain_table(group, ["GE"])["GE"], NO_NOISE)
    assert found["n_patients"] == 40
    assert found["mae_points"] == pytest.approx(100 * np.abs(error).mean(), abs=0.01)
    assert found["bias_points"] == pytest.approx(100 * error.mean(), abs=0.01)
    assert found["mse"] == pytest.approx((error**2).mean(), abs=1e-4)
    assert found["r2"] == pytest.approx(1 - (error**2).sum() / ((true - true.mean()) ** 2).sum(), abs=0.01)
    half = 1.96 * 100 * np.abs(error).std(ddof=1) / np.sqrt(40)
    assert found["ci95"]["mae_points"] == pytest.approx(
        [found["mae_points"] - half, found["mae_points"] + half], abs=0.02
    )
    assert all(found["noise_sd"][name] == 0 for name in FIGURES)


def test_intervals_of_private_sums_hold_the_truth():
    rng = np.random.default_rng(1)
    inside = {"mae_points": 0, "bias_points": 0, "mse": 0}
    truth = {"mae_points": 5.82, "bias_points": -2.0, "mse": 0.0053}
    for seed in range(300):
        sums, noise = from_private(private_table(patients(60, seed), ["GE"], 0.48, rng), 0.48)
        found = figures(sums["GE"], noise)
        for name in inside:
            low, high = found["ci95"][name]
            inside[name] += low <= truth[name] <= high
    assert all(0.91 <= count / 300 <= 0.99 for count in inside.values()), inside


def test_what_noise_swamps_is_unknown():
    rng = np.random.default_rng(2)
    sums, noise = from_private(private_table(patients(12), ["GE"], 0.6, rng), 0.6)
    found = figures(sums["GE"], noise)
    assert found["r2"] is None and found["ci95"]["r2"] is None
    sums, noise = from_private(private_table(patients(5), ["GE"], 5.0, rng), 5.0)
    found = figures(sums["GE"], noise)
    assert [found[name] for name in ("n_patients", *FIGURES)] == [None] * 5


def test_too_few_patients_have_no_r2_and_a_group_left_out_has_nothing():
    assert figures(plain_table(patients(9), ["GE"])["GE"], NO_NOISE)["r2"] is None
    assert figures(plain_table(patients(4), ["GE"])["GE"], NO_NOISE)["mae_points"] is None


def test_noise_takes_no_figure_beyond_what_it_can_be():
    rng = np.random.default_rng(3)
    sums, noise = from_private(private_table(patients(40), ["GE"], 0.3, rng), 0.3)
    sums["GE"][3] = -0.01  # of squared errors
    found = figures(sums["GE"], noise)
    assert found["r2"] == 1 and found["ci95"]["r2"][1] == 1
    assert found["mse"] == 0 and found["ci95"]["mse"][0] == 0
