"""A lower bound on epsilon from one run with many canaries, each included by its own fair coin.

Steinke, Nasr and Jagielski (2023), https://arxiv.org/abs/2305.08846. Whoever guesses more coins right than an
(epsilon, delta)-private release allows has shown that the release is not (epsilon, delta)-private.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

CONFIDENCE = 0.95
MAX_EPSILON, NUM_GRID = 30.0, 601
"""Epsilons that are tried on the way up; beyond 30 a release and none at all look alike."""


@dataclass(frozen=True)
class Guesses:
    """What an auditor guessed: +1 in, -1 out, 0 no guess; shape (m,), int."""

    guesses: NDArray[np.int64]

    def correct(self, included: NDArray[np.bool_]) -> int:
        """Number of guesses that agree with the coins."""
        return int(np.count_nonzero(self.guesses == np.where(included, 1, -1)))

    @property
    def num(self) -> int:
        """Number of canaries that were guessed at all."""
        return int(np.count_nonzero(self.guesses))


def guess(scores: NDArray[np.float64], num_in: int, num_out: int) -> Guesses:
    """The `num_in` highest scores are guessed in, the `num_out` lowest out, the rest is left (Algorithm 1, line 5).

    Both numbers must be chosen before anyone looks at the coins; equal scores are taken in the canaries' order.

    Args:
        scores: Shape (m,), finite; larger means rather included. Made without the coins.
        num_in: k+, at least 0.
        num_out: k-, at least 0; together at most m.
    """
    if min(num_in, num_out) < 0 or num_in + num_out > len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"Expected finite scores and 0 <= num_in + num_out <= {len(scores)}.")
    order = np.argsort(-scores, kind="stable")
    guesses = np.zeros(len(scores), np.int64)
    guesses[order[:num_in]] = 1
    guesses[order[len(scores) - num_out :]] = -1
    return Guesses(guesses)


def p_value(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """Probability of so many correct guesses under (epsilon, delta)-privacy, at most (Theorem 5.2).

    With W ~ Binomial(r, e^epsilon / (1 + e^epsilon)) it is P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, where i
    runs from 1 to m. Beyond i = v the probability stays and its divisor grows, so that v terms are enough.

    Args:
        num_canaries: m, all that had a coin, guessed or not.
        num_guesses: r, at most m.
        num_correct: v, at most r.
        epsilon: At least 0.
        delta: In [0, 1].
    """
    if not (0 <= num_correct <= num_guesses <= num_canaries and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError("Expected 0 <= num_correct <= num_guesses <= num_canaries, epsilon >= 0, delta in [0, 1].")
    accuracy = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(num_correct - 1, num_guesses, accuracy))
    if delta == 0 or num_correct == 0:
        return min(tail, 1.0)
    steps = np.arange(1, num_correct + 1)
    near_misses = np.cumsum(binom.pmf(num_correct - steps, num_guesses, accuracy))
    return min(tail + 2 * num_canaries * delta * float((near_misses / steps).max()), 1.0)


def lower_bound(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon up to which every smaller one is refuted; 0 where none is.

    Guarantees: where the release is (epsilon, delta)-private and the guesses were made without the coins, the answer
    exceeds epsilon with a probability of at most 1 - confidence. A small answer proves nothing: it may be the attack
    that is weak.

    Returns:
        In [0, `MAX_EPSILON`], within 1e-6 below the exact value.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(num_canaries, num_guesses, num_correct, epsilon, delta) < 1 - confidence

    # Upwards from 0 rather than by halving at once: with delta the p-value need not grow with epsilon throughout.
    grid = np.linspace(0, MAX_EPSILON, NUM_GRID)
    first = next((index for index, epsilon in enumerate(grid) if not refuted(epsilon)), NUM_GRID)
    if first == 0:
        return 0.0
    if first == NUM_GRID:
        return MAX_EPSILON
    low, high = float(grid[first - 1]), float(grid[first])
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def highest_provable(num_canaries: int, num_guesses: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound where every guess is right: no attack, on no release, proves more with so many guesses.

    At delta = 0 it is log(p / (1 - p)) with p = (1 - confidence)^(1 / num_guesses).
    """
    return lower_bound(num_canaries, num_guesses, num_guesses, delta, confidence)
