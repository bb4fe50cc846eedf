"""The bound of the one-run audit: an independent implementation's numbers, and releases whose epsilon is known."""

import math

import numpy as np
import pytest
from scipy.stats import beta, norm

from fedcmr.simulations.audit.one_run import (
    chance,
    curve,
    gaussian_delta,
    gaussian_mu,
    guess,
    highest_provable,
    is_refuted,
    lower_bound,
    p_value,
)


@pytest.mark.parametrize(
    ("num", "num_guesses", "num_correct", "significance", "delta", "expected"),
    [
        (30, 30, 30, 0.05, 1e-3, 4.16900),
        (100, 100, 100, 0.05, 1e-3, 6.14863),
        (100, 30, 27, 0.05, 1e-3, 1.44676),
        (400, 400, 399, 0.05, 1e-3, 7.08596),
        (500, 500, 500, 0.05, 1e-3, 8.51364),
        (500, 100, 87, 0.05, 1e-5, 2.29998),
        (1000, 1000, 780, 0.05, 1e-3, 1.44291),
        (1000, 300, 290, 0.01, 1e-5, 3.98225),
        (50, 50, 30, 0.05, 1e-3, 0.0),
    ],
)
def test_the_numbers_of_jax_privacy(num, num_guesses, num_correct, significance, delta, expected):
    """jax_privacy 2.0.0 with dp_accounting 0.6.0: `auditing._epsilon_one_run_fdp` for the same counts."""
    found = lower_bound(num, num_guesses, num_correct, delta, confidence=1 - significance)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_gaussian_mechanism_of_an_epsilon():
    """1 / `dp_accounting.get_sigma_gaussian` 0.6.0 at delta 1e-3, and the definition by rates of errors."""
    assert gaussian_mu(8.0, 1e-3) == pytest.approx(2.083273645459, rel=1e-9)
    assert gaussian_mu(1.0, 1e-3) == pytest.approx(0.388401248306, rel=1e-9)
    for epsilon, delta in ((0.0, 1e-3), (7.98, 1e-5), (100.0, 1e-3)):
        mu = gaussian_mu(epsilon, delta)
        assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
        thresholds = np.linspace(-10, 20, 4001)
        privacy_loss = norm.sf(thresholds - mu) - np.exp(min(epsilon, 50)) * norm.sf(thresholds)
        assert epsilon > 50 or privacy_loss.max() == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize("family", ["gaussian", "approximate"])
def test_a_curve_is_a_test_that_its_mechanism_allows(family):
    """A share y is found with x false alarms; (epsilon, delta) allows y <= e^epsilon x + delta, and so for the rest."""
    epsilon, delta = 1.5, 0.01
    claim = curve(family, epsilon, delta)
    found = np.linspace(1e-6, 1 - 1e-6, 999)
    alarms = np.array([claim(y) for y in found])
    assert (np.diff(alarms) >= 0).all() and (alarms >= 0).all() and (alarms <= found).all()
    slack = np.maximum(found - np.exp(epsilon) * alarms, (1 - alarms) - np.exp(epsilon) * (1 - found))
    assert slack.max() == pytest.approx(delta, abs=1e-4), "no worse than the claim, and as bad as it somewhere"


@pytest.mark.parametrize("num", [20, 100])
def test_all_right_under_approximate_privacy_without_delta_is_randomised_response(num):
    """Nothing guesses c coins with a higher probability than p^c, p = e^epsilon / (1 + e^epsilon)."""
    p = 0.05 ** (1 / num)
    assert highest_provable(num, num, 0.0, "approximate") == pytest.approx(math.log(p / (1 - p)), rel=1e-3)
    exact = beta.ppf(0.05, 0.9 * num, num - 0.9 * num + 1)  # Clopper and Pearson, 90 % right
    found = lower_bound(num, num, int(0.9 * num), 0.0, "approximate")
    assert 0 < found <= math.log(exact / (1 - exact)) * 1.001


def test_more_canaries_refute_more_and_less_is_claimed_of_less():
    assert [round(highest_provable(num, num, 1e-3), 1) for num in (30, 100, 400, 500)] == [4.2, 6.1, 8.2, 8.5]
    bounds = [lower_bound(400, 400, right, 1e-3) for right in (400, 399, 380, 300, 200)]
    assert bounds == sorted(bounds, reverse=True) and bounds[-1] == 0
    assert lower_bound(400, 400, 380, 1e-3) > lower_bound(400, 400, 380, 1e-3, "approximate") > 0
    assert lower_bound(10**6, 10**6, 10**6, 1e-3, confidence=1e-9) <= 100


@pytest.mark.parametrize("family", ["gaussian", "approximate"])
def test_the_p_value_is_where_the_bound_stops_refuting(family):
    bound = lower_bound(300, 200, 180, 1e-3, family)
    assert p_value(300, 200, 180, bound, 1e-3, family) == pytest.approx(0.05, rel=3e-3)
    assert p_value(300, 200, 180, bound + 1, 1e-3, family) > 0.05 > p_value(300, 200, 180, bound / 2, 1e-3, family)
    assert p_value(300, 200, 100, 1.0, 1e-3, family) > 0.5 and p_value(300, 200, 0, 1.0, 1e-3, family) == 1


@pytest.mark.parametrize(("epsilon", "share", "tight"), [(2.0, 0.2, 0.4), (7.98, 0.2, 0.4), (7.98, 1.0, 0.2)])
def test_gaussian_releases_are_bounded_in_95_of_100_repetitions(epsilon, share, tight):
    """Every canary is released on its own by a mechanism of this very epsilon, and the best test guesses."""
    rng = np.random.default_rng(0)
    num, repetitions, delta = 500, 200, 1e-3
    mu = gaussian_mu(epsilon, delta)
    bounds = []
    for _ in range(repetitions):
        coins = rng.random(num) < 0.5
        guesses = guess(mu * coins + rng.normal(size=num) - mu / 2, int(share * num))
        bounds.append(lower_bound(num, guesses.num, guesses.correct(coins), delta))
    assert np.mean(np.array(bounds) <= epsilon) >= 0.95
    assert np.median(bounds) > tight * epsilon, "not by never saying anything"


def test_randomised_response_is_bounded_too():
    """(epsilon, 0)-private, and no Gaussian mechanism: the family that asks for nothing else holds."""
    rng = np.random.default_rng(0)
    num, truth = 60, 1 / (1 + math.exp(-1.0))
    bounds = []
    for _ in range(300):
        coins = rng.random(num) < 0.5
        told = np.where(rng.random(num) < truth, coins, ~coins)
        guesses = guess(np.where(told, 1.0, -1.0), 40)
        bounds.append(lower_bound(num, 40, guesses.correct(coins), 1e-3, "approximate"))
    assert np.mean(np.array(bounds) <= 1.0) >= 0.95 and np.mean(np.array(bounds) > 0.3) > 0.2


def test_the_furthest_from_zero_are_guessed_and_of_the_rest_nothing_is_said():
    scores = np.array([0.1, 5.0, -3.0, 0.2, 4.0])
    guesses = guess(scores, 3)
    assert guesses.guesses.tolist() == [0, 1, -1, 0, 1] and guesses.num == 3
    assert guesses.correct(np.array([True, True, True, True, False])) == 1
    assert guess(scores, 5).guesses.tolist() == [1, 1, -1, 1, 1] and guess(scores, 0).num == 0


def test_coins_that_mean_nothing_are_right_half_of_the_time():
    assert chance(10, 10) == pytest.approx(2**-10) and chance(10, 0) == 1


@pytest.mark.parametrize("num", [6, -1])
def test_what_cannot_be_is_refused(num):
    with pytest.raises(ValueError, match="num in 0"):
        guess(np.arange(5.0), num)
    with pytest.raises(ValueError, match="num_correct"):
        is_refuted(10, 11, 3, curve("gaussian", 1.0, 1e-3), 0.05)
    with pytest.raises(ValueError, match="epsilon >= 0"):
        curve("gaussian", 1.0, 0.0)
