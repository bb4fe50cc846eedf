"""What a site counts: a filter that holds for a server which picks each request in the light of earlier answers."""

import math
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy.optimize import brentq
from scipy.stats import norm

from fedcmr.shared.privacy import Release, epsilon, gaussian_epsilon
from fedcmr.shared.privacy_filter import PrivacyFilter, filter_of, mu_squared, renyi_order
from tests.shared.test_privacy import analytic_gaussian_epsilon

DELTA = 1e-3


# A server that adapts, computed on a grid of outcomes


def losses(sigma, rate):
    """(privacy loss, probability) of one subsampled Gaussian where the patient takes part, on a fine grid."""
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 40_001)
    without = norm.pdf(x, 0, sigma)
    patient = (1 - rate) * without + rate * norm.pdf(x, 1, sigma)
    weight = patient * (x[1] - x[0])
    return np.log(patient / without), weight


def hockey_stick(sigma, rate):
    """The function eps -> delta of one release."""
    loss, weight = losses(sigma, rate)
    order = np.argsort(loss)
    loss, weight = loss[order], weight[order]
    above = np.append(np.cumsum(weight[::-1])[::-1], 0)
    discounted = np.append(np.cumsum((weight * np.exp(-loss))[::-1])[::-1], 0)

    def delta(eps):
        first = np.searchsorted(loss, eps)
        return above[first] - np.exp(np.minimum(eps, 600)) * discounted[first]

    return delta


def adaptive_delta(first, seconds, eps):
    """Delta at `eps` of a server that picks, after the outcome of `first`, the worst of the `seconds`."""
    loss, weight = losses(first.noise_multiplier, first.sample_rate)
    curves = [hockey_stick(second.noise_multiplier, second.sample_rate)(eps - loss) for second in seconds]
    return float((np.max(curves, axis=0).clip(0) * weight).sum())


def costliest_seconds(privacy_filter, first, cap):
    """For several sample rates the release with which a filter comes to its cap."""
    seconds = []
    for rate in (1.0, 0.5, 0.2, 0.1, 0.05):

        def excess(noise, rate=rate):
            return privacy_filter.of([first, Release(noise, rate, 1)], DELTA)[0] - cap

        smallest = brentq(excess, 0.2, 40, xtol=1e-9)
        seconds.append(Release(smallest * (1 + 1e-6), rate, 1))
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "cap", "fitting"),
    [
        (Release(1.0, 0.5, 1), 3.0, {1.0: 1.604, 0.2: 0.746, 0.05: 0.502}),
        (Release(2.0, 1.0, 1), 2.0, {1.0: 2.111, 0.2: 0.914, 0.05: 0.576}),
    ],
)
def test_a_server_that_adapts_spends_the_cap_and_no_more_under_the_filter_and_more_under_an_accountant(
    first, cap, fitting
):
    """`fitting`: sample rate -> least noise of a second release that, fixed in advance, is within the cap."""
    by_accountant = [Release(noise, rate, 1) for rate, noise in fitting.items()]
    assert all(epsilon([first, second], DELTA)[0] <= cap for second in by_accountant)
    assert adaptive_delta(first, by_accountant, cap) > 1.2 * DELTA, "to pick one of them is more than the cap"
    by_filter = costliest_seconds(filter_of(0.05, cap, DELTA), first, cap)
    assert 0.01 * DELTA < adaptive_delta(first, by_filter, cap) <= DELTA
    refused = [
        second for second in by_accountant if PrivacyFilter(renyi_order(cap, DELTA)).of([first, second], DELTA)[0] > cap
    ]
    assert refused == by_accountant, "the filter lets none of these pass"


def test_with_everybody_in_every_step_a_server_that_adapts_gains_nothing():
    """It may pick the noise and the number of steps as it likes; all are one Gaussian mechanism in the end."""
    first, cap = Release(1.5, 1.0, 1), 4.0
    gaussian = PrivacyFilter()
    second = costliest_seconds(gaussian, first, cap)[0]
    assert adaptive_delta(first, [second], cap) == pytest.approx(DELTA, rel=1e-3), "nothing is lost either"


# What a release costs


def test_the_gaussian_filter_is_exact():
    releases = [Release(3.0, 1.0, 2), Release(5.0, 1.0, 7)]
    spent, accountant = PrivacyFilter().of(releases, DELTA)
    assert accountant == "gaussian"
    assert spent == pytest.approx(analytic_gaussian_epsilon(math.sqrt(2 / 9 + 7 / 25), DELTA), rel=1e-8)
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    for release in releases:
        accountant.compose(dp_accounting.GaussianDpEvent(release.noise_multiplier), release.num_steps)
    assert spent == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


@pytest.mark.parametrize("order", [2, 3, 18, 125])
def test_the_renyi_filter_counts_as_an_independent_accountant_at_that_order(order):
    releases = [Release(2.0, 0.2, 5), Release(1.0, 0.05, 3), Release(6.0, 1.0, 4)]
    accountant = rdp.RdpAccountant([order], dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for release in releases:
        event = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        if release.sample_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(release.sample_rate, event)
        accountant.compose(event, release.num_steps)
    spent, _ = PrivacyFilter(order).of(releases, DELTA)
    assert spent == pytest.approx(accountant.get_epsilon(DELTA), rel=0.02)


@pytest.mark.parametrize("order", [None, 2, 30, 512])
@pytest.mark.parametrize(
    "release",
    [
        Release(1e-3, 0.5, 1),
        Release(0.3, 0.999, 1),
        Release(1e6, 0.5, 9),
        Release(1e-200, 0.5, 1),
        Release(1e5, 1e-9, 1),
    ],
)
def test_a_sample_never_costs_more_than_everybody_nor_less_than_nothing(order, release):
    everybody = Release(release.noise_multiplier, 1.0, release.num_steps)
    cost = PrivacyFilter(order).cost(release)
    assert 0 < cost <= PrivacyFilter(order).cost(everybody)


def test_releases_of_few_patients_cannot_fill_a_ledger_for_nothing():
    """At most some tens of thousands fit under a large cap, as of releases of everybody with the most noise allowed."""
    cap, delta = 8.0, 1e-3
    tiny, everybody = Release(100.0, 1e-6, 1), Release(100.0, 1.0, 1)
    privacy_filter = filter_of(1e-6, cap, delta)
    assert privacy_filter.cost(tiny) == pytest.approx(privacy_filter.cost(everybody))
    assert cap / privacy_filter.cost(Release(1.0, 1e-6, 1)) < 60_000
    honest = Release(1.0, 0.1, 5)
    accountant = rdp.RdpAccountant([privacy_filter.order], dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 5)
    assert privacy_filter.of([honest], delta)[0] == pytest.approx(accountant.get_epsilon(delta), rel=0.02), "no dearer"


def test_the_order_follows_from_cap_and_delta_alone_and_is_the_best_for_everybody():
    for cap, delta in ((8.0, 1e-3), (1.0, 1e-5), (0.3, 1e-4)):
        chosen = renyi_order(cap, delta)

        def largest_mu_squared(order, cap=cap, delta=delta):
            offset = PrivacyFilter(order).epsilon(1e3, delta) - 1e3
            return (cap - offset) / order * 2

        assert largest_mu_squared(chosen) >= max(map(largest_mu_squared, (chosen - 1, chosen + 1, 64))) or chosen == 2
    assert filter_of(1.0, 8.0, 1e-3) == PrivacyFilter()
    assert filter_of(0.999, 8.0, 1e-3) == PrivacyFilter(renyi_order(8.0, 1e-3))


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    for privacy_filter in (PrivacyFilter(), PrivacyFilter(5)):
        assert privacy_filter.of([], DELTA)[0] == 0
        assert privacy_filter.of([Release(0.0, 0.5, 1)], DELTA)[0] == math.inf
    assert mu_squared(Release(2.0, 0.5, 3)) == 0.75


@pytest.mark.parametrize("noise_multiplier", [1e155, sys.float_info.max])
@pytest.mark.parametrize("privacy_filter", [PrivacyFilter(), PrivacyFilter(5)])
def test_noise_beyond_all_measure_is_counted_too(privacy_filter, noise_multiplier):
    assert privacy_filter.of([Release(noise_multiplier, 0.5, 10)], DELTA)[0] < 1e-9


# The accountant of plans that are fixed in advance


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("mu", [1e-4, 0.01, 0.3, 1.0, 3.0, 8.0, 30.0])
def test_the_gaussian_epsilon_inverts_its_curve_and_is_rounded_up(mu, delta):
    value = gaussian_epsilon(mu**2, delta)

    def curve(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))

    if value == 0:
        assert curve(0.0) <= delta
    else:
        assert curve(value) <= delta * (1 + 1e-6)
        assert curve(value * (1 - 1e-6)) >= delta * (1 - 1e-6)


def test_an_accountant_is_never_asked_about_more_than_it_can_answer_at_once(monkeypatch):
    """Two hundred releases, each unlike the others: beyond a few mechanisms a sample counts as everybody."""
    asked = []
    real = epsilon.__globals__["_rdp_epsilon"]
    monkeypatch.setitem(epsilon.__globals__, "_rdp_epsilon", lambda h, d: asked.append(len(h)) or real(h, d))
    honest = Release(8.0, 1.0, 1)
    hostile = [Release(1e6 * (1 + number * 1e-3), 0.5, 1) for number in range(200)]
    value, accountant = epsilon([honest, *hostile], DELTA)
    assert (accountant, asked) == ("gaussian", []), "with so much noise there is nothing to gain from the sample"
    assert value == pytest.approx(epsilon([honest], DELTA)[0], rel=1e-3)
    several = [Release(2.0 + number / 100, 0.01, 1) for number in range(200)]
    value, accountant = epsilon([honest, *several], DELTA)
    assert max(asked) <= 5
    assert value <= gaussian_epsilon(sum(map(mu_squared, [honest, *several])), DELTA)
