"""A lower bound on epsilon from one run with many canaries, each included by its own fair coin.

Mahloujifar, Melis and Chaudhuri (2024), "Auditing f-Differential Privacy in One Run",
https://arxiv.org/abs/2410.22235. Whoever guesses more coins right than a release with trade-off function f allows has
shown that the release is not f-private. The trade-off function is the claim as a curve: f(x) is the smallest rate of
misses of any test of "in" against "out" whose rate of false alarms is x (Dong et al. 2019,
https://arxiv.org/abs/1905.02383). Two families are known here, each with one member per epsilon at a given delta:

- "gaussian": the Gaussian mechanism of that epsilon. A study in which every patient takes part in every step claims
  just this, because Gaussian mechanisms one after another are together a Gaussian mechanism.
- "approximate": nothing but (epsilon, delta). It holds for every private release, a sampled one too, and proves less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import binom

CONFIDENCE = 0.95
MAX_EPSILON = 100.0
"""Beyond it a release and none at all look alike."""

Family = Literal["gaussian", "approximate"]
Curve = Callable[[float], float]
"""y -> the smallest rate of false alarms x at which a test may find a share y of what it looks for: 1 - f(x) = y."""


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


def guess(scores: NDArray[np.float64], num: int) -> Guesses:
    """Positive scores are guessed in, others out; of all but the `num` furthest from 0 nothing is said.

    The number must be chosen before anyone looks at the coins; equal scores are taken in the canaries' order.

    Args:
        scores: Shape (m,), finite; positive means rather included. Made without the coins.
        num: In 0..m.
    """
    if not 0 <= num <= len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"Expected finite scores and num in 0..{len(scores)}, got {num}.")
    chosen = np.argsort(-np.abs(scores), kind="stable")[:num]
    guesses = np.zeros(len(scores), np.int64)
    guesses[chosen] = np.where(scores[chosen] > 0, 1, -1)
    return Guesses(guesses)


def curve(family: Family, epsilon: float, delta: float) -> Curve:
    """The family's member of this epsilon at `delta`.

    Args:
        family: Family of trade-off functions.
        epsilon: At least 0.
        delta: In [0, 1); above 0 for the Gaussian family.
    """
    if not (0 <= epsilon < math.inf and 0 <= delta < 1 and (delta > 0 or family == "approximate")):
        raise ValueError(f"Expected epsilon >= 0 and delta in [0, 1), got {epsilon!r} and {delta!r}.")
    if family == "gaussian":
        mu = gaussian_mu(epsilon, delta)
        return lambda y: float(ndtr(ndtri(y) - mu))
    # f(x) = max(0, 1 - delta - e^epsilon x, e^-epsilon (1 - delta - x)): Wasserman and Zhou (2010), proposition 2.3.
    return lambda y: max(0.0, math.exp(-epsilon) * (y - delta), 1 - delta - math.exp(epsilon) * (1 - y))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Distance between "in" and "out", in standard deviations, of the Gaussian mechanism of (epsilon, delta)."""
    log_mu = brentq(lambda log: gaussian_delta(epsilon, math.exp(log)) - delta, math.log(1e-9), math.log(1e3))
    return math.exp(float(log_mu))


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest delta with which mu is (epsilon, delta)-private.

    Balle and Wang (2018), https://arxiv.org/abs/1805.06530, theorem 8.
    """
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))))


def is_refuted(num_canaries: int, num_guesses: int, num_correct: int, claim: Curve, significance: float) -> bool:
    """Whether so many right guesses, or more, have a probability below `significance` under the claim.

    The paper's recursion, for coins with two sides. Let p_i be the probability of i right guesses among the c that are
    made of m canaries. For every set of numbers I the theorem says sum_I i p_i / m <= 1 - f(sum_I (c - i + 1) p_(i-1)
    / m), and so bounds from below how likely fewer right guesses are, given how likely many are. Suppose that at least
    `num_correct` have the probability `significance`; where what follows for fewer adds up to more than one, they do
    not.

    Args:
        num_canaries: m, all that had a coin, guessed or not.
        num_guesses: c, at most m; chosen before the coins were thrown.
        num_correct: At most c.
        claim: The trade-off function that is put to the test, see `Curve`.
        significance: In (0, 1).
    """
    if not 0 <= num_correct <= num_guesses <= num_canaries or not 0 < significance < 1:
        raise ValueError("Expected 0 <= num_correct <= num_guesses <= num_canaries and significance in (0, 1).")
    right = significance * num_correct / num_canaries  # sum of i p_i / m over i >= num_correct, at least
    wrong = significance * (num_guesses - num_correct) / num_canaries  # the same of (c - i) p_i / m
    for index in range(num_correct - 1, -1, -1):
        needed = claim(right)
        if needed <= wrong:  # nothing more follows for fewer
            break
        right = min(right + index / (num_guesses - index) * (needed - wrong), 1.0)
        wrong = needed
    return right + wrong > num_guesses / num_canaries


def p_value(
    num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float, family: Family = "gaussian"
) -> float:
    """Probability of so many right guesses under the claim, at most, within a thousandth of itself."""
    claim = curve(family, epsilon, delta)
    low, high = math.log(1e-300), -1e-12
    if not is_refuted(num_canaries, num_guesses, num_correct, claim, math.exp(high)):
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        refuted = is_refuted(num_canaries, num_guesses, num_correct, claim, math.exp(middle))
        low, high = (low, middle) if refuted else (middle, high)
    return math.exp(high)


def lower_bound(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    delta: float,
    family: Family = "gaussian",
    confidence: float = CONFIDENCE,
) -> float:
    """The largest epsilon that is refuted; 0 where none is.

    Guarantees: where the release is as private as the family's member of an epsilon at `delta` and the guesses were
    made without the coins, the answer exceeds that epsilon with a probability of at most 1 - confidence. A small answer
    proves nothing: it may be the attack that is weak.

    Returns:
        In [0, `MAX_EPSILON`], within 1e-6 below the exact value.
    """

    def refuted(epsilon: float) -> bool:
        return is_refuted(num_canaries, num_guesses, num_correct, curve(family, epsilon, delta), 1 - confidence)

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        if high == MAX_EPSILON:
            return MAX_EPSILON
        low, high = high, min(2 * high, MAX_EPSILON)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def highest_provable(
    num_canaries: int,
    num_guesses: int,
    delta: float,
    family: Family = "gaussian",
    confidence: float = CONFIDENCE,
) -> float:
    """The bound where every guess is right: no attack, on no release, proves more with so many guesses."""
    return lower_bound(num_canaries, num_guesses, num_guesses, delta, family, confidence)


def chance(num_guesses: int, num_correct: int) -> float:
    """Probability of at least so many right guesses about coins that nothing was done with."""
    return float(binom.sf(num_correct - 1, num_guesses, 0.5))
