"""The bound of the one-run audit: the paper's own numbers, the closed form, and releases whose epsilon is known."""

import functools
import math

import numpy as np
import pytest
from scipy.stats import beta

from simulations.audit.one_run import guess, highest_provable, lower_bound, p_value


def test_the_numbers_printed_in_the_paper():
    """arXiv:2305.08846v1, appendix D and section 7."""
    assert lower_bound(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=1e-3)
    assert lower_bound(100_000, 1510, 1439, 1e-5) == pytest.approx(2.675, abs=1e-3)


@pytest.mark.parametrize(("num_guesses", "num_correct"), [(20, 20), (50, 41), (100, 60)])
def test_without_delta_it_is_the_binomial_interval(num_guesses, num_correct):
    """P[Binomial(r, p) >= v] = 0.05 is Clopper and Pearson's lower limit for p; epsilon is its log odds."""
    p = beta.ppf(0.05, num_correct, num_guesses - num_correct + 1)
    assert lower_bound(100, num_guesses, num_correct, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-5)


def test_guessing_all_right_proves_so_much_and_no_more():
    p = 0.05 ** (1 / 40)
    assert highest_provable(40, 40, 0.0) == pytest.approx(math.log(p / (1 - p)), abs=1e-5)
    assert lower_bound(40, 40, 20, 0.0) == 0 and lower_bound(40, 40, 0, 1e-3) == 0


def test_delta_costs_and_more_so_with_more_canaries():
    bounds = [lower_bound(m, 40, 38, delta) for m, delta in ((40, 0.0), (40, 1e-5), (40, 1e-3), (400, 1e-3))]
    assert bounds == sorted(bounds, reverse=True) and len(set(bounds)) == 4


@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-3, 0.02])
def test_the_p_value_is_the_theorem_written_as_loops(delta):
    for m, r, v, epsilon in ((30, 12, 11, 0.7), (30, 30, 19, 0.0), (50, 8, 8, 2.0)):
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        alpha = max(sum(pmf[max(v - i, 0) : v]) / i for i in range(1, m + 1))
        assert p_value(m, r, v, epsilon, delta) == pytest.approx(min(1, sum(pmf[v:]) + 2 * m * delta * alpha))


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_randomised_response_is_bounded_in_95_of_100_repetitions(epsilon):
    """Every coin is told truly with probability e^eps / (1 + e^eps): (epsilon, 0)-private, and nothing tells more."""
    rng = np.random.default_rng(0)
    num, repetitions = 60, 600
    truth = 1 / (1 + math.exp(-epsilon))
    bound = functools.cache(lambda num_correct: lower_bound(num, 40, num_correct, 0.0))
    bounds = []
    for _ in range(repetitions):
        coins = rng.random(num) < 0.5
        told = np.where(rng.random(num) < truth, coins, ~coins)
        guesses = guess(told + 1e-9 * rng.random(num), 20, 20)
        bounds.append(bound(guesses.correct(coins)))
    covered = np.mean(np.array(bounds) <= epsilon)
    assert covered >= 0.95 - 2 * math.sqrt(0.05 * 0.95 / repetitions)
    # Not by never saying anything: the claim of half of it is refuted often.
    assert np.mean(np.array(bounds) > epsilon / 2) > (0.05 if epsilon < 1 else 0.2)


def test_the_highest_are_in_the_lowest_out_and_between_nothing_is_said():
    scores = np.array([0.1, 5.0, -3.0, 0.2, 4.0])
    guesses = guess(scores, 2, 1)
    assert guesses.guesses.tolist() == [0, 1, -1, 0, 1] and guesses.num == 3
    assert guesses.correct(np.array([True, True, True, True, False])) == 1
    assert guess(scores, 1, 0).guesses.tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("arguments", [(4, 2), (-1, 2)])
def test_more_guesses_than_canaries_are_refused(arguments):
    with pytest.raises(ValueError, match="num_in"):
        guess(np.arange(5.0), *arguments)
    with pytest.raises(ValueError, match="num_correct"):
        p_value(10, 11, 3, 1.0, 0.0)
