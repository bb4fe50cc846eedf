"""Membership figures against scikit-learn, a loop over pairs, and repetition."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, mannwhitneyu
from sklearn.metrics import roc_auc_score

from fedcmr.simulations.audit.roc import FALSE_ALARM, auc_delong, clopper_pearson, control, membership


def test_auc_is_that_of_scikit_learn_also_with_ties():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40) + 1.0, rng.integers(0, 9, 31) * 1.0
    expected = roc_auc_score(np.r_[np.ones(40), np.zeros(31)], np.r_[members, others])
    assert auc_delong(members, others)[0] == pytest.approx(expected)


def test_delong_is_the_formula_over_all_pairs():
    rng = np.random.default_rng(1)
    members, others = rng.normal(0.6, 1, 25), rng.normal(0, 1, 18)
    wins = (members[:, None] > others).astype(float)
    variance = wins.mean(1).var(ddof=1) / 25 + wins.mean(0).var(ddof=1) / 18
    auc, (low, high) = auc_delong(members, others)
    assert (high - low) / 2 == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    assert (high + low) / 2 == pytest.approx(auc)


def test_without_a_difference_95_of_100_intervals_hold_one_half():
    rng = np.random.default_rng(2)
    intervals = [auc_delong(rng.normal(size=60), rng.normal(size=60))[1] for _ in range(800)]
    assert np.mean([low <= 0.5 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_with_300_patients_each_the_interval_is_narrower_than_a_tenth():
    rng = np.random.default_rng(3)
    low, high = auc_delong(rng.normal(size=300), rng.normal(size=300))[1]
    assert high - low < 0.1


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (3, 30), (30, 30)])
def test_clopper_pearson_is_scipys(successes, trials):
    interval = binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(successes, trials) == pytest.approx((interval.low, interval.high))


def test_the_strict_end_allows_one_in_a_hundred():
    others = np.arange(300.0)  # 297, 298 and 299 may lie above the threshold of 296
    members = np.array([296.0, 296.5, 297.5, 400.0, -1.0])
    found = membership(members, others)
    assert found.tpr == 3 / 5 and found.num_above_all_others == 1
    assert found.p_above_all_others == pytest.approx(5 / 305)


def test_one_exposed_patient_shows_in_the_tail_and_not_in_the_average():
    rng = np.random.default_rng(4)
    members, others = rng.normal(size=200), rng.normal(size=200)
    members[7] = 12.0
    found = membership(members, others)
    assert found.as_dict()["contains_chance"] and found.largest_member > 11 > 5 > found.largest_other
    assert membership(np.r_[members[:190], np.full(10, 9.0)], others).p_above_all_others < 1e-3


def test_too_few_or_broken_scores_are_refused():
    with pytest.raises(ValueError, match="two finite"):
        membership(np.array([1.0]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="two finite"):
        membership(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


def test_the_control_of_members_against_members_finds_nothing_but_what_is_there():
    """The first half of the members against the second: the same law, so p-values are uniform; a leak is noticed."""
    rng = np.random.default_rng(5)
    found = [membership(rng.normal(1, 1, 60), rng.normal(size=60)) for _ in range(400)]
    assert np.mean([m.p_control < 0.05 for m in found]) == pytest.approx(0.05, abs=0.03)
    assert all(m.control_holds == (m.p_control >= FALSE_ALARM) for m in found) and found[0].control_holds
    leaking = membership(np.linspace(3, 0, 60), rng.normal(size=60))  # who was scored first scores higher
    assert leaking.control_auc == 1 and not leaking.control_holds and not leaking.as_dict()["control_holds"]
    chosen = np.arange(60) % 2 == 0
    assert membership(np.linspace(3, 0, 60), rng.normal(size=60), chosen).control_holds


def test_the_control_is_mann_and_whitneys_test():
    first, second = np.array([3.0, 1.0, 4.0]), np.array([2.0, 0.5])
    assert control(first, second) == (5 / 6, mannwhitneyu(first, second, method="exact").pvalue)
    assert control(np.zeros(4), np.zeros(4)) == (0.5, 1.0)
    assert control(np.array([2.0]), np.array([1.0]))[1] == 1, "one against one proves nothing"
