"""What a site may still release when each request is chosen in the light of the answers before it: privacy filters.

A server that deviates picks the noise and the sample rate of its next request after it has seen the last answer. The
epsilon of a composition whose parameters are fixed in advance is no bound on what it learns. A filter is: before each
release it adds that release's cost to a running sum and refuses what would take the sum past a budget, and whatever is
requested in whatever order stays within (epsilon, delta).

Two filters, of which a site's policy decides one:
    Gaussian: every release is one of all patients. Costs are mu^2 = steps / noise^2, and the budget is that of a single
        Gaussian mechanism, nothing lost: Smith & Thakurta (2022), https://arxiv.org/abs/2210.17520; Koskela et al.
        (2022), https://arxiv.org/abs/2209.15596.
    Renyi: some releases are of a random sample. Costs are Renyi divergences at one order: Feldman & Zrnic (2021),
        https://arxiv.org/abs/2008.11193; Lecuyer (2021), https://arxiv.org/abs/2103.01379; Whitehouse et al. (2023),
        https://arxiv.org/abs/2203.05481. The order is fixed in advance, from the policy's cap and delta alone: the best
        of several orders in hindsight would be a choice in the light of the answers. This filter costs more.

A sum needs the stored costs and nothing else, so a long history never makes a request slow.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedcmr.shared.privacy import Release, gaussian_epsilon

MAX_ORDER = 512
"""Largest order of the Renyi divergences. The largest orders are those of the smallest budgets; beyond about a thousand
the terms of the subsampled Gaussian's series overflow."""

LEAST_MU_SQUARED = 1e-4
"""What a release of a random sample counts at least, as mu^2 of one of everybody: that of a step with noise 100, the
most that a policy allows by default. Otherwise releases of few patients would cost next to nothing, and whoever
requests them could make the ledger arbitrarily long, and every later answer arbitrarily slow."""


@dataclass(frozen=True)
class PrivacyFilter:
    """How releases are counted against a budget.

    Guarantees:
        Whatever releases are requested in the light of earlier answers: as long as `epsilon(sum of their costs, delta)`
        was at most the cap before each of them was made, all together are (cap, delta)-differentially private for
        add/remove-one-patient neighbours. Where a site changes from one filter to another, deltas of both add up.

    Attributes:
        order: None for the Gaussian filter, or the Renyi filter's integer order, at least 2.
    """

    order: int | None = None

    @property
    def accountant(self) -> str:
        """The filter's name, as reports give it."""
        return "gaussian" if self.order is None else f"renyi filter, order {self.order}"

    def cost(self, release: Release) -> float:
        """What a release adds to the sum; infinity without noise.

        A sample can only hide a patient, so a subsampled release costs at most what one of everybody with the same
        noise does. That is what the Gaussian filter counts, and the Renyi filter where the divergence cannot be found.
        The latter never counts it as less than `LEAST_MU_SQUARED`, unless one of everybody would cost less still.
        """
        everybody = mu_squared(release)
        if self.order is None:
            return everybody
        everybody *= self.order / 2
        if release.sample_rate == 1 or not math.isfinite(everybody):
            return everybody
        # Imported here: it takes a second and a half to load, and most studies sample nobody.
        from opacus.accountants.analysis.rdp import compute_rdp

        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                sampled = float(
                    compute_rdp(
                        q=release.sample_rate,
                        noise_multiplier=release.noise_multiplier,
                        steps=release.num_steps,
                        orders=[self.order],
                    )[0]
                )
            except ArithmeticError:
                return everybody
        if not sampled > 0:  # NaN, and a negative rounding
            return everybody
        return min(everybody, max(sampled, LEAST_MU_SQUARED * self.order / 2))

    def epsilon(self, spent: float, delta: float) -> float:
        """The epsilon at `delta` of a sum of costs; 0 where nothing was spent.

        For Renyi divergences Proposition 12 of Canonne et al. (2020), https://arxiv.org/abs/2004.00010.
        """
        if spent == 0 or self.order is None:
            return gaussian_epsilon(spent, delta)
        return max(0.0, spent + _renyi_offset(self.order, delta))

    def of(self, releases: Iterable[Release], delta: float) -> tuple[float, str]:
        """The epsilon of releases together, and the filter's name."""
        return self.epsilon(math.fsum(map(self.cost, releases)), delta), self.accountant


def mu_squared(release: Release) -> float:
    """Square of the Gaussian parameter mu of a release, as if it were one of everybody."""
    squared = release.noise_multiplier * release.noise_multiplier  # a power would raise where this is infinite
    return release.num_steps / squared if squared > 0 else math.inf


def filter_of(min_sample_rate: float, max_epsilon: float, max_delta: float) -> PrivacyFilter:
    """The filter for releases of at least this sample rate, under a cap: fixed before the first of them."""
    return PrivacyFilter() if min_sample_rate == 1 else PrivacyFilter(renyi_order(max_epsilon, max_delta))


def renyi_order(max_epsilon: float, max_delta: float) -> int:
    """The order at which a budget allows the most releases of everybody: a public constant of the cap.

    A release of everybody costs order * mu^2 / 2, so this is the order at which the budget's mu^2 is largest.
    """
    return max(range(2, MAX_ORDER + 1), key=lambda order: (max_epsilon - _renyi_offset(order, max_delta)) / order)


def _renyi_offset(order: int, delta: float) -> float:
    """What the conversion to (epsilon, delta) adds to a Renyi divergence."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
