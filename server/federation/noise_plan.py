"""The least noise with which a study's releases stay within a target epsilon at every site."""

import math
from dataclasses import dataclass, replace

from scipy.optimize import brentq

from fedcmr.shared.privacy import Release
from fedcmr.shared.privacy_filter import filter_of


@dataclass(frozen=True)
class NoisePlan:
    """What one site will release over a whole run.

    Attributes:
        statistics: One release of the statistics of the style vectors; every patient takes part.
        gradients: All private gradient steps of the run on the generator.
        segmenter: Those on the segmenter; None where there are none.
    """

    statistics: Release
    gradients: Release
    segmenter: Release | None = None


@dataclass(frozen=True)
class SegmenterPart:
    """The segmenter's part of a plan.

    Attributes:
        share: Part of mu squared of the whole run that goes to it, in (0, 1).
        num_rounds: Rounds, at least 1; a site charges each by itself.
        num_steps: Private gradient steps over all rounds, a multiple of them.
    """

    share: float
    num_rounds: int
    num_steps: int

    def __post_init__(self) -> None:
        _check(0 < self.share < 1, "share in (0, 1)", self.share)
        _check(self.num_rounds >= 1 and self.num_steps >= 1, "num_rounds and num_steps >= 1", self)
        _check(self.num_steps % self.num_rounds == 0, "num_rounds that divides the steps", self.num_rounds)


def plan_noise(
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    num_gradient_steps: int,
    statistics_share: float,
    num_rounds: int = 1,
    segmenter: SegmenterPart | None = None,
) -> NoisePlan:
    """The least noise with which the style statistics and all gradient steps together stay within the target.

    Each site accounts for its releases by a privacy filter, and so does the plan: by the filter of a site whose cap and
    delta are the targets and which allows this sample rate. Otherwise an honest study would run out of budget half-way.

    The budget is divided as in Gaussian differential privacy, where the squares of mu add up: Dong et al. (2019),
    https://arxiv.org/abs/1905.02383, Corollary 3.3, with sqrt(T) q / sigma for T subsampled steps.

    Args:
        target_epsilon: Epsilon of the whole run at one site, > 0.
        target_delta: Delta of the guarantee, in (0, 1).
        sample_rate: Probability with which a gradient step samples a patient, in (0, 1].
        num_gradient_steps: Number of gradient steps over all rounds.
        statistics_share: Part of mu squared that goes to the statistics, in (0, 1); with a segmenter, of what that
            leaves.
        num_rounds: Rounds among which the gradient steps are divided evenly; a site charges each round by itself.
        segmenter: What goes to steps on the segmenter, at the same sample rate; None for nothing.
    """
    _check(0 < target_epsilon < math.inf, "finite target_epsilon > 0", target_epsilon)
    _check(0 < target_delta < 1, "target_delta in (0, 1)", target_delta)
    _check(0 < sample_rate <= 1, "sample_rate in (0, 1]", sample_rate)
    _check(num_gradient_steps >= 1, "num_gradient_steps >= 1", num_gradient_steps)
    _check(0 < statistics_share < 1, "statistics_share in (0, 1)", statistics_share)
    _check(num_rounds >= 1 and num_gradient_steps % num_rounds == 0, "num_rounds that divides the steps", num_rounds)
    privacy_filter = filter_of(sample_rate, target_epsilon, target_delta)

    def plan(noise_multiplier: float) -> NoisePlan:
        mu_squared = num_gradient_steps * (sample_rate / noise_multiplier) ** 2
        statistics = math.sqrt((1 - statistics_share) / statistics_share / mu_squared)
        parts = (Release(statistics, 1.0, 1), Release(noise_multiplier, sample_rate, num_gradient_steps))
        if segmenter is None:
            return NoisePlan(*parts)
        whole = mu_squared / (1 - statistics_share) / (1 - segmenter.share)
        noise = sample_rate * math.sqrt(segmenter.num_steps / (segmenter.share * whole))
        return NoisePlan(*parts, Release(noise, sample_rate, segmenter.num_steps))

    def in_rounds(release: Release, rounds: int) -> float:
        return rounds * privacy_filter.cost(replace(release, num_steps=release.num_steps // rounds))

    def excess(log_noise: float) -> float:
        planned = plan(math.exp(log_noise))
        spent = privacy_filter.cost(planned.statistics) + in_rounds(planned.gradients, num_rounds)
        if segmenter is not None and planned.segmenter is not None:
            spent += in_rounds(planned.segmenter, segmenter.num_rounds)
        return privacy_filter.epsilon(spent, target_delta) / target_epsilon - 0.9975

    upper = math.log(sample_rate * math.sqrt(num_gradient_steps / (1 - statistics_share)))  # mu = 1
    while excess(upper) > 0:
        upper += 1
        _check(upper < 14, "a target_epsilon that some noise can meet", target_epsilon)
    lower = upper - 1
    while excess(lower) <= 0:
        upper, lower = lower, lower - 1
    return plan(math.exp(brentq(excess, lower, upper, xtol=5e-4)))


def least_noise(target_epsilon: float, target_delta: float, min_sample_rate: float = 1.0) -> float:
    """The least noise multiplier with which one release over all patients stays within the target.

    Args:
        target_epsilon: Epsilon of the release at one site, > 0.
        target_delta: Delta of the guarantee, in (0, 1).
        min_sample_rate: The least sample rate that the sites' policies allow, in (0, 1]; it decides which filter they
            use, as in `plan_noise`.
    """
    _check(0 < target_epsilon < math.inf, "finite target_epsilon > 0", target_epsilon)
    _check(0 < target_delta < 1, "target_delta in (0, 1)", target_delta)
    privacy_filter = filter_of(min_sample_rate, target_epsilon, target_delta)

    def excess(log_noise: float) -> float:
        return privacy_filter.of([Release(math.exp(log_noise), 1.0, 1)], target_delta)[0] / target_epsilon - 0.9975

    lower, upper = -1.0, 0.0
    while excess(upper) > 0:
        upper += 1
        _check(upper < 14, "a target_epsilon that some noise can meet", target_epsilon)
    while excess(lower) <= 0:
        lower -= 1
    return math.exp(brentq(excess, lower, upper, xtol=5e-4))


def _check(condition: bool, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"Expected {expected}, got {value!r}.")
