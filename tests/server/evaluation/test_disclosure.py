"""No published cell is of fewer than five patients, none can be subtracted, and a few patients have no r2."""

import stat
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from fedcmr.server.evaluation.coverage import coverage
from fedcmr.server.evaluation.disclosure import MIN_GROUP, OTHERS, joined, published
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.experiments.models import predictions_folder, save_predictions


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"GE": 20, "Philips": 20}, {"GE": 20, "Philips": 20}),
        ({"GE": 3, "Philips": 4, "Siemens": 20}, {OTHERS: 7, "Siemens": 20}),
        ({"GE": 1, "Philips": 12, "Siemens": 20}, {OTHERS: 13, "Siemens": 20}),
        ({"GE": 1, "Siemens": 20}, {OTHERS: 21}),
        ({"GE": 4, "Philips": 4, "Siemens": 4}, {OTHERS: 12}),
        ({}, {}),
    ],
)
def test_small_groups_are_joined_until_none_is_small(sizes, expected):
    labels = [name for name, size in sizes.items() for _ in range(size)]
    assert Counter(joined(labels)) == expected


def test_whatever_the_sizes_no_group_is_small_and_no_difference_to_the_total_is():
    rng = np.random.default_rng(0)
    for _ in range(300):
        labels = rng.choice(
            list("abcdef"), size=rng.integers(MIN_GROUP, 40), p=[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]
        ).tolist()
        sizes = Counter(joined(labels)).values()
        assert min(sizes) >= MIN_GROUP and sum(sizes) == len(labels)
        assert all(rest == 0 or rest >= MIN_GROUP for size in sizes if (rest := len(labels) - size) >= 0)


def scores(num: int):
    rng = np.random.default_rng(1)
    true = rng.uniform(0.2, 0.7, num)
    return table(true, true + rng.normal(0, 0.05, num), ["GE"] * num, 100, 0)["GE"]


def test_r2_is_left_out_below_ten_patients_also_of_simulated_ones():
    few, enough = published({"a": {"few": scores(9), "enough": scores(10)}}, rounded=False)["a"].values()
    assert few["r2"] is few["ci95"]["r2"] is None and few["mae_points"] == scores(9)["mae_points"]
    assert enough == scores(10)


def test_figures_of_real_patients_have_no_more_digits_than_a_reader_needs():
    value = published(scores(12), rounded=True)
    assert value["mae_points"] == round(scores(12)["mae_points"], 1) and value["r2"] == round(scores(12)["r2"], 2)
    assert value["ci95"]["mae_points"] == [round(limit, 1) for limit in scores(12)["ci95"]["mae_points"]]
    true, guess = np.linspace(0.2, 0.7, 12), np.linspace(0.2, 0.6, 12)
    difference = published(paired_table(true, guess, true, ["GE"] * 12, 100, 0), rounded=True)["GE"]
    assert difference["difference_points"] == round(difference["difference_points"], 1)
    assert difference["ci95"] == [round(limit, 1) for limit in difference["ci95"]]
    figures = published({"a": coverage(true, guess, np.full(12, 0.05))}, rounded=True)["a"]
    assert all(row["observed"] == round(row["observed"], 2) for row in figures["coverage"])


def test_predictions_lie_apart_from_the_report_and_are_this_accounts_alone(make_study):
    run = make_study(num_patients=0)
    patient = SimpleNamespace(info=SimpleNamespace(vendor="GE", ef=0.5))
    save_predictions(
        run,
        "matrix/synthetic/GE",
        [("hospitals", [patient])],
        {"hospitals": {"true": [patient.info.ef], "predicted": [0.4]}},
    )
    path = predictions_folder(run) / "matrix" / "synthetic" / "GE.json"
    assert path.relative_to(run.path).parts[0] == "private" and not (run.path / "predictions").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(parent.stat().st_mode) for parent in path.parents[:4]} == {0o700}
