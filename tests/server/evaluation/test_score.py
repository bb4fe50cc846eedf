import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from fedcmr.server.evaluation.score import METRICS, paired_difference, score
from fedcmr.server.evaluation.tables import paired_table, predict_the_mean, table


def patients(num=40, seed=0, slope=0.8, noise=0.06):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.1, 0.75, num)
    return true, 0.1 + slope * true + rng.normal(0, noise, num)


def test_figures_equal_scikit_learn_and_numpy():
    true, predicted = patients()
    result = score(true, predicted, 200, seed=0)
    error = 100 * (predicted - true)
    assert result["n_patients"] == 40
    assert result["mse"] == pytest.approx(metrics.mean_squared_error(true, predicted))
    assert result["r2"] == pytest.approx(metrics.r2_score(true, predicted))
    assert result["mae_points"] == pytest.approx(100 * metrics.mean_absolute_error(true, predicted))
    assert result["r"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    assert result["bias_points"] == pytest.approx(error.mean())
    assert result["loa_low_points"] == pytest.approx(error.mean() - 1.96 * error.std(ddof=1))
    assert result["loa_high_points"] == pytest.approx(error.mean() + 1.96 * error.std(ddof=1))


def test_intervals_equal_a_plain_bootstrap_loop():
    true, predicted = patients(num=25)
    result = score(true, predicted, 4000, seed=1)
    rng = np.random.default_rng(2)
    draws = [rng.integers(0, 25, 25) for _ in range(4000)]
    loop = {
        "mae_points": [100 * metrics.mean_absolute_error(true[d], predicted[d]) for d in draws],
        "r2": [metrics.r2_score(true[d], predicted[d]) for d in draws],
        "r": [np.corrcoef(true[d], predicted[d])[0, 1] for d in draws],
    }
    for name, values in loop.items():
        expected = np.percentile(values, [2.5, 97.5])
        assert result["ci95"][name] == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0])), name


def test_equal_seeds_give_equal_intervals_and_chunks_do_not_matter(monkeypatch):
    true, predicted = patients()
    whole = score(true, predicted, 300, seed=3)
    assert score(true, predicted, 300, seed=3) == whole
    monkeypatch.setattr("fedcmr.server.evaluation.score.CHUNK_ELEMENTS", 40 * 7)
    chunked = score(true, predicted, 300, seed=3)
    assert chunked["ci95"]["r2"] == pytest.approx(whole["ci95"]["r2"])


@pytest.mark.parametrize(
    ("true", "predicted", "undefined"),
    [
        ([0.5], [0.6], {"r2", "r", "loa_low_points", "loa_high_points", "category_kappa"}),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6], {"r2", "r"}),
        ([0.3, 0.5, 0.7], [0.5, 0.5, 0.5], {"r"}),
        ([0.3, 0.5, 0.7], [0.5, np.nan, 0.5], set(METRICS)),
        ([np.nan, np.nan], [0.5, 0.5], set(METRICS)),
        ([], [], set(METRICS)),
    ],
)
def test_what_cannot_be_told_is_null_in_json(true, predicted, undefined):
    result = score(true, predicted, 100, seed=0)
    assert {name for name in METRICS if result[name] is None} == undefined
    assert all(result["ci95"][name] is None for name in undefined)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_answers_that_are_no_number_are_counted_once_a_patient():
    predicted = np.full((2, 4), 0.5)
    predicted[:, 1], predicted[1, 3] = np.nan, np.inf
    result = score([0.3, 0.4, 0.5, 0.6], predicted, 100, seed=0)
    assert (result["n_patients"], result["n_undefined"]) == (4, 2)
    assert {result[name] for name in METRICS} == {None}
    assert score([0.3, np.nan, 0.5, np.nan], predicted, 100, seed=0)["n_undefined"] == 0, "of known patients only"


def test_one_patient_has_no_interval():
    assert set(score([0.5], [0.6], 100, seed=0)["ci95"].values()) == {None}


def test_patients_of_unknown_truth_are_left_out():
    true, predicted = patients(num=10)
    with_unknown = score([*true, np.nan], [*predicted, 0.4], 100, seed=0)
    assert with_unknown == score(true, predicted, 100, seed=0)


def test_table_has_each_vendor_and_all():
    true, predicted = patients(num=9)
    vendors = ["Siemens", "GE", "Philips"] * 3
    result = table(true, predicted, vendors, 100, seed=0)
    assert list(result) == ["GE", "Philips", "Siemens", "all"]
    assert result["GE"] == score(true[1::3], predicted[1::3], 100, seed=0)
    assert result["all"]["n_patients"] == 9


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        score([0.1, 0.2], [0.1, 0.2, 0.3], 100, seed=0)


def test_predicting_the_training_mean_has_r2_at_most_zero():
    true, _ = patients()
    baseline = predict_the_mean([0.2, 0.4, 0.6], len(true))
    assert np.unique(baseline) == pytest.approx(0.4)
    result = score(true, baseline, 100, seed=0)
    assert result["r2"] <= 0 and result["r"] is None


def seeds_of(true, num_seeds, noise, seed=5):
    rng = np.random.default_rng(seed)
    return np.stack([true + rng.normal(0, noise, len(true)) for _ in range(num_seeds)])


def test_figures_over_seeds_are_the_mean_of_each_seeds_figures():
    true, _ = patients()
    predicted = seeds_of(true, 3, 0.08)
    together, alone = score(true, predicted, 200, seed=0), [score(true, one, 200, seed=0) for one in predicted]
    for name in METRICS:
        assert together[name] == pytest.approx(np.mean([one[name] for one in alone])), name
    assert together["n_patients"] == 40
    assert score(true, predicted[:1], 200, seed=0) == alone[0]


@pytest.mark.slow
def test_intervals_over_seeds_equal_a_plain_loop_that_draws_the_same_patients_for_every_seed():
    true, _ = patients(num=25)
    predicted = seeds_of(true, 3, 0.08)
    result = score(true, predicted, 4000, seed=1)
    rng = np.random.default_rng(2)
    draws = [rng.integers(0, 25, 25) for _ in range(4000)]
    loop = {
        "mae_points": [np.mean([100 * metrics.mean_absolute_error(true[d], p[d]) for p in predicted]) for d in draws],
        "r2": [np.mean([metrics.r2_score(true[d], p[d]) for p in predicted]) for d in draws],
    }
    for name, values in loop.items():
        expected = np.percentile(values, [2.5, 97.5])
        assert result["ci95"][name] == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0])), name


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_paired_difference_equals_scipys_bootstrap_of_the_patients_differences(num_seeds):
    true, _ = patients(num=30)
    first, second = seeds_of(true, num_seeds, 0.05), seeds_of(true, num_seeds, 0.09, seed=6)
    result = paired_difference(true, first, second, 9000, seed=0)
    per_patient = [
        100 * np.mean([abs(a[i] - true[i]) - abs(b[i] - true[i]) for a, b in zip(first, second, strict=True)])
        for i in range(30)
    ]
    reference = stats.bootstrap((per_patient,), np.mean, n_resamples=9000, method="percentile", random_state=1)
    low, high = reference.confidence_interval
    assert result["n_patients"] == 30
    assert result["difference_points"] == pytest.approx(
        score(true, first, 100, seed=0)["mae_points"] - score(true, second, 100, seed=0)["mae_points"]
    )
    assert result["ci95"] == pytest.approx([low, high], abs=0.06 * (high - low))


def test_a_pairs_interval_is_not_widened_by_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.1, 0.8, 50)
    shared_error = rng.normal(0, 0.2, 50)
    result = paired_difference(true, true + shared_error, true + 0.5 * shared_error, 1000, seed=0)
    constant = paired_difference(true, true + 0.03, true + 0.01, 1000, seed=0)
    single = score(true, true + shared_error, 1000, seed=0)["ci95"]["mae_points"]
    assert np.ptp(result["ci95"]) == pytest.approx(0.5 * np.ptp(single), rel=1e-6)
    assert constant["ci95"] == pytest.approx([2, 2])


def test_pairs_of_a_model_with_itself_and_of_swapped_models():
    true, predicted = patients()
    other = seeds_of(true, 2, 0.05)  # another number of seeds
    assert paired_difference(true, predicted, predicted, 100, seed=0)["ci95"] == [0, 0]
    forth, back = paired_difference(true, predicted, other, 500, 3), paired_difference(true, other, predicted, 500, 3)
    assert forth["difference_points"] == pytest.approx(-back["difference_points"])
    assert forth["ci95"] == pytest.approx([-limit for limit in reversed(back["ci95"])])


@pytest.mark.parametrize(
    ("true", "predicted", "other"), [([], [], []), ([0.5, 0.6], [0.5, np.nan], [0.5, 0.5]), ([np.nan], [0.5], [0.5])]
)
def test_a_pair_that_cannot_be_told_is_null(true, predicted, other):
    result = paired_difference(true, predicted, other, 100, seed=0)
    assert result["difference_points"] is None and result["ci95"] is None
    assert result["n_undefined"] == np.isnan(np.array(predicted)[np.isfinite(true)]).sum()
    json.dumps(result, allow_nan=False)


def test_pairs_leave_out_patients_of_unknown_truth_and_one_patient_has_no_interval():
    result = paired_difference([0.5, np.nan], [0.6, 0.1], [0.52, 0.9], 100, seed=0)
    assert (result["n_patients"], result["ci95"]) == (1, None)
    assert result["difference_points"] == pytest.approx(8)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_difference([0.1, 0.2], [0.1, 0.2], [0.1, 0.2, 0.3], 100, seed=0)


def test_tables_over_seeds_have_each_vendors_own_patients():
    true, predicted = patients(num=9)
    vendors = ["Siemens", "GE", "Philips"] * 3
    stacked, other = np.stack([predicted, true]), seeds_of(true, 1, 0.05)
    scores = table(true, stacked, vendors, 100, seed=0)
    pairs = paired_table(true, stacked, other, vendors, 100, seed=0)
    assert list(scores) == list(pairs) == ["GE", "Philips", "Siemens", "all"]
    assert scores["GE"] == score(true[1::3], stacked[:, 1::3], 100, seed=0)
    assert pairs["Philips"] == paired_difference(true[2::3], stacked[:, 2::3], other[:, 2::3], 100, seed=0)
