import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import binom, chisquare, kstest, norm

from fedcmr.shared.privacy import (
    Release,
    clip_to_norm,
    epsilon,
    moment_vectors,
    os_generator,
    poisson_sample,
    private_mean_gradient,
    private_moments,
    private_sum,
)

HOSTILE = [
    np.full(7, 1e300),
    np.full(7, -1e308),
    np.full(7, 5e-324),
    np.array([np.nan, 1, 1, 1, 1, 1, 1]),
    np.array([np.inf, 0, 0, 0, 0, 0, 0]),
    np.array([-np.inf, np.nan, 0, 0, 0, 0, 1e300]),
    np.zeros(7),
]


def independent_epsilon(releases, delta):
    """Google's privacy-loss-distribution accountant."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    for release in releases:
        event = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        if release.sample_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(release.sample_rate, event)
        accountant.compose(event, release.num_steps)
    return accountant.get_epsilon(delta)


def analytic_gaussian_epsilon(mu, delta):
    """Balle & Wang (2018), https://arxiv.org/abs/1805.06530, Theorem 8: the exact curve of a Gaussian mechanism."""

    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0, 100)


# The mechanism


@pytest.mark.parametrize("num_slices", [1, 50])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_patient_moves_the_sum_by_at_most_the_clip(num_slices, scale):
    rng = np.random.default_rng(num_slices)
    others = list(rng.normal(size=(5, 7)))
    patient = rng.normal(scale=scale, size=(num_slices, 7)).mean(axis=0)  # the caller averages slices before the clip
    moved = private_sum([*others, patient], 0.7, 0, 7, None) - private_sum(others, 0.7, 0, 7, None)
    assert np.linalg.norm(moved) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("patient", HOSTILE)
def test_no_vector_at_all_moves_the_sum_by_more_than_the_clip(patient):
    others = [np.ones(7)]
    moved = private_sum([*others, patient], 0.7, 0, 7, None) - private_sum(others, 0.7, 0, 7, None)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= 0.7 * (1 + 1e-12)


def test_a_vector_with_a_non_finite_entry_counts_as_zero():
    assert not clip_to_norm(np.array([np.nan, 1.0]), 1.0).any()
    assert not clip_to_norm(np.array([np.inf, 1.0]), 1.0).any()


def test_clipping_keeps_the_direction_of_long_vectors_and_leaves_short_ones():
    assert clip_to_norm(np.array([3.0, 4.0]), 1.0) == pytest.approx([0.6, 0.8])
    assert clip_to_norm(np.array([3.0, 4.0]), 5.0).tolist() == [3.0, 4.0]
    assert clip_to_norm(np.array([3e300, 4e300]), 1.0) == pytest.approx([0.6, 0.8])


def test_the_sum_without_noise_equals_a_loop():
    vectors = np.random.default_rng(0).normal(size=(6, 3))
    expected = sum(vector * min(1, 0.9 / np.linalg.norm(vector)) for vector in vectors)
    assert private_sum(vectors, 0.9, 0, 3, None) == pytest.approx(expected)


def test_noise_is_normal_with_the_promised_standard_deviation():
    noise = private_sum([], 0.5, 3.0, 40_000, os_generator())
    assert noise.std() == pytest.approx(1.5, rel=0.03)  # 8 standard errors
    assert kstest(noise / 1.5, "norm").pvalue > 1e-6


def test_two_calls_differ_in_noise_though_every_global_seed_is_the_same():
    sums = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        sums.append(private_sum([np.ones(4)], 1.0, 1.0, 4, os_generator()))
    assert not np.isclose(sums[0], sums[1]).any()


def test_an_empty_batch_is_noised():
    assert private_sum([], 1.0, 1.0, 5, os_generator()).all()


def test_noise_without_a_generator_or_with_an_endless_clip_is_refused():
    with pytest.raises(ValueError, match="noise generator"):
        private_sum([np.ones(2)], 1.0, 1.0, 2, None)
    with pytest.raises(ValueError, match="finite max_grad_norm"):
        private_sum([np.ones(2)], math.inf, 1.0, 2, os_generator())


@pytest.mark.parametrize(
    ("clip", "noise", "vector"),
    [
        (0.0, 1.0, np.ones(2)),
        (math.nan, 1.0, np.ones(2)),
        (1.0, -1.0, np.ones(2)),
        (1.0, math.nan, np.ones(2)),
        (1.0, 1.0, np.ones(3)),
        (1.0, 1.0, np.ones((2, 1))),
    ],
)
def test_values_that_void_the_guarantee_are_refused(clip, noise, vector):
    with pytest.raises(ValueError, match="Expected"):
        private_sum([vector], clip, noise, 2, os_generator())


def test_the_divisor_does_not_depend_on_how_many_patients_there_are():
    def mean(count):
        return private_mean_gradient([np.array([0.5])] * count, 1, 0, expected_batch_size=4, dimension=1, rng=None)

    assert [mean(count).item() for count in (0, 1, 2, 8)] == [0, 0.125, 0.25, 1]


def test_batch_sizes_follow_the_binomial():
    rng = os_generator()
    sizes = np.array([len(poisson_sample(12, 0.4, rng)) for _ in range(4000)])
    expected = 4000 * binom.pmf(np.arange(13), 12, 0.4)
    common = expected > 5
    observed = np.bincount(sizes, minlength=13)
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert chisquare(observed, expected).pvalue > 1e-6


def test_sampling_at_rate_one_takes_every_patient_and_at_a_low_rate_sometimes_none():
    rng = os_generator()
    assert poisson_sample(5, 1.0, rng).tolist() == [0, 1, 2, 3, 4]
    assert min(len(poisson_sample(3, 0.1, rng)) for _ in range(200)) == 0


def test_patients_are_sampled_independently_of_each_other():
    rng = os_generator()
    taken = np.zeros((4000, 2))
    for row in taken:
        row[poisson_sample(2, 0.3, rng)] = 1
    assert taken.mean(axis=0) == pytest.approx([0.3, 0.3], abs=0.05)
    assert abs(np.corrcoef(taken.T)[0, 1]) < 0.1


# The moments


@pytest.mark.parametrize("size", [1, 2, 12])
def test_a_patient_moves_both_moments_together_by_at_most_one(size):
    rng = np.random.default_rng(size)
    styles = rng.standard_cauchy((300, size)) * 10.0 ** rng.uniform(-5, 5, (300, 1))
    directions = rng.normal(size=(100, size))
    boundary = 4.0 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    corners = 4.0 * np.eye(size)  # all the length in one coordinate: the square is clipped too
    hostile = np.full((3, size), [[np.nan], [np.inf], [1e308]])
    norms = np.linalg.norm(moment_vectors(np.concatenate([styles, boundary, corners, hostile]), 4.0), axis=1)
    assert norms.max() <= 1 + 1e-12
    assert norms[400] == pytest.approx(1)  # a corner uses the whole bound: no noise is wasted


def test_moments_without_noise_are_those_of_the_codes():
    styles = np.random.default_rng(0).normal(size=(50, 12)).clip(-1.5, 1.5)
    mean, square = private_moments(styles, 8.0, 0, 50, None)
    assert mean == pytest.approx(styles.mean(axis=0))
    assert square == pytest.approx((styles**2).mean(axis=0))


def test_noise_of_the_moments_has_the_documented_scale():
    clip, noise_multiplier, nominal = 4.0, 2.0, 10
    mean, square = private_moments(np.zeros((0, 20_000)), clip, noise_multiplier, nominal, os_generator())
    assert mean.std() == pytest.approx(noise_multiplier * math.sqrt(2) * clip / nominal, rel=0.04)
    assert square.std() == pytest.approx(noise_multiplier * math.sqrt(2) * clip**2 / 2 / nominal, rel=0.04)
    assert abs(np.corrcoef(mean, square)[0, 1]) < 0.05


# The accountant


@pytest.mark.parametrize(
    ("release", "delta", "published_prv"),
    [
        (Release(1.0, 0.01, 1000), 1e-5, 1.8384),
        (Release(1.0, 0.1, 200), 1e-3, 7.1069),
        (Release(0.8, 0.05, 500), 1e-4, 10.4121),
    ],
)
def test_epsilon_equals_reference_values(release, delta, published_prv):
    value, accountant = epsilon([release], delta)
    assert accountant == "prv"
    assert value == pytest.approx(published_prv, abs=2e-4)
    assert value == pytest.approx(independent_epsilon([release], delta), rel=0.01)


@pytest.mark.parametrize(
    ("release", "delta", "published_rdp"),
    [
        (Release(1.0, 0.01, 1000), 1e-5, 2.1014),
        (Release(1.0, 0.1, 200), 1e-3, 8.1842),
        (Release(0.8, 0.05, 500), 1e-4, 11.7188),
    ],
)
@pytest.mark.parametrize("failure", [RuntimeError("mean"), math.nan, math.inf, -1.0, 0.0, 1e9])
def test_epsilon_falls_back_to_renyi_where_prv_fails_or_makes_no_sense(
    monkeypatch, failure, release, delta, published_rdp
):
    def get_epsilon(self, delta, **_):
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(PRVAccountant, "get_epsilon", get_epsilon)
    value, accountant = epsilon([release], delta)
    assert accountant == "rdp"
    assert value == pytest.approx(published_rdp, abs=2e-4)


@pytest.mark.parametrize(("sigma", "num_steps"), [(5.0, 10), (2.0, 1), (0.8, 1), (30.0, 400)])
def test_full_batches_cost_what_the_analytic_gaussian_says(sigma, num_steps):
    exact = analytic_gaussian_epsilon(math.sqrt(num_steps) / sigma, 1e-3)
    value, _ = epsilon([Release(sigma, 1.0, num_steps)], 1e-3)
    assert exact <= value <= 1.01 * exact


@pytest.mark.parametrize(
    "releases",
    [
        [Release(0.7, 1.0, 1), Release(2.2, 1.0, 10)],
        [Release(1.0, 1.0, 1), Release(0.65, 0.2, 10)],
        [Release(3.0, 1.0, 1), Release(1.1, 0.1, 60), Release(8.0, 1.0, 20), Release(0.9, 0.02, 200)],
    ],
)
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_unlike_releases_compose_as_an_independent_accountant_says(releases, delta):
    reference = independent_epsilon(releases, delta)
    for order in (releases, releases[::-1]):
        value, _ = epsilon(order, delta)
        assert 0.9999 * reference <= value <= 1.01 * reference


def test_rounds_charged_one_by_one_cost_as_much_as_all_at_once():
    at_once = epsilon([Release(2.0, 1.0, 50)], 1e-3)
    assert epsilon([Release(2.0, 1.0, 1)] * 50, 1e-3) == at_once
    assert at_once[0] > 5 * epsilon([Release(2.0, 1.0, 1)], 1e-3)[0]  # what a fresh accountant each round would claim


def test_full_batches_of_unlike_noise_cost_what_they_cost_one_by_one_in_a_general_accountant():
    """They are joined into one Gaussian mechanism before the accountant sees them."""
    releases = [Release(sigma, 1.0, steps) for sigma, steps in ((3.0, 1), (5.5, 7), (20.0, 100), (9.0, 2))]
    mu = math.sqrt(sum(release.num_steps / release.noise_multiplier**2 for release in releases))
    exact = analytic_gaussian_epsilon(mu, 1e-3)
    assert exact <= epsilon(releases, 1e-3)[0] <= 1.01 * exact
    mixed = [*releases, Release(1.5, 0.1, 30)]
    assert epsilon(mixed, 1e-3)[0] == pytest.approx(independent_epsilon(mixed, 1e-3), rel=0.01)


@pytest.mark.parametrize("noise", [1e100, 1e-300])
def test_extreme_noise_is_no_error(noise):
    value, _ = epsilon([Release(noise, 1.0, 3), Release(noise, 1.0, 1)], 1e-3)
    assert value == math.inf if noise < 1 else 0 <= value < 0.1


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], 1e-3)[0] == 0
    assert epsilon([Release(5.0, 1.0, 1), Release(0.0, 0.01, 1)], 1e-3)[0] == math.inf


@pytest.mark.parametrize("noise", [1e-200, 1e-3, 0.05])
def test_very_little_noise_costs_very_much(noise):
    assert epsilon([Release(noise, 1.0, 1)], 1e-3)[0] > 100


@pytest.mark.parametrize("noise", [50.0, 1e4, 1e9])
def test_very_much_noise_never_costs_a_negative_epsilon(noise):
    value, _ = epsilon([Release(noise, 1.0, 1)], 1e-3)
    assert 0 <= value < 0.1


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-3, math.nan])
def test_a_delta_outside_the_unit_interval_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon([Release(1.0, 1.0, 1)], delta)


@pytest.mark.parametrize(
    "values", [(-1.0, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), (1, 0.0, 1), (1, 1.1, 1), (1, math.nan, 1), (1, 1, 0)]
)
def test_a_release_that_cannot_be_is_refused(values):
    with pytest.raises(ValueError, match="Expected"):
        Release(*values)
