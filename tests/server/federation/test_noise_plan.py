import pytest

from fedcmr.server.federation.noise_plan import plan_noise
from fedcmr.shared.privacy import Release
from fedcmr.shared.privacy_filter import PrivacyFilter, filter_of, renyi_order
from tests.shared.test_privacy import independent_epsilon


@pytest.mark.parametrize(
    ("target", "delta", "sample_rate", "num_steps", "share"),
    [
        (8, 1e-3, 1.0, 10, 0.5),
        (1, 1e-5, 1.0, 200, 0.2),
        (3, 1e-3, 0.3, 10, 0.8),
        (0.05, 1e-3, 1.0, 1, 0.5),
        (40, 1e-2, 1.0, 5, 0.5),
    ],
)
def test_a_plan_spends_the_target_and_no_more(target, delta, sample_rate, num_steps, share):
    plan = plan_noise(target, delta, sample_rate, num_steps, share)
    assert (plan.statistics.sample_rate, plan.statistics.num_steps) == (1.0, 1)
    assert (plan.gradients.sample_rate, plan.gradients.num_steps) == (sample_rate, num_steps)
    privacy_filter = filter_of(sample_rate, target, delta)
    assert privacy_filter.order == (None if sample_rate == 1 else renyi_order(target, delta))
    spent, _ = privacy_filter.of([plan.statistics, plan.gradients], delta)
    assert 0.99 * target <= spent <= target
    assert independent_epsilon([plan.statistics, plan.gradients], delta) <= target


def test_a_plan_divides_the_budget_by_its_share():
    plan = plan_noise(4, 1e-3, 1.0, 10, 0.25)
    mu_squared = {
        "statistics": plan.statistics.noise_multiplier**-2,
        "gradients": 10 * plan.gradients.noise_multiplier**-2,
    }
    assert mu_squared["statistics"] / sum(mu_squared.values()) == pytest.approx(0.25)


def test_a_plan_of_many_small_rounds_holds_what_each_of_them_is_charged_at_least():
    target, delta, rate, num_rounds = 0.5, 1e-3, 0.001, 300
    plan = plan_noise(target, delta, rate, num_rounds, 0.5, num_rounds)
    privacy_filter = filter_of(rate, target, delta)
    charges = [plan.statistics, *[Release(plan.gradients.noise_multiplier, rate, 1)] * num_rounds]
    assert 0.95 * target <= privacy_filter.of(charges, delta)[0] <= target
    at_once = plan_noise(target, delta, rate, num_rounds, 0.5)
    assert at_once.gradients.noise_multiplier < plan.gradients.noise_multiplier, "one charge for all has no such floor"


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 1e-3, 1.0, 10, 0.5),
        (8, 0.0, 1.0, 10, 0.5),
        (8, 1e-3, 0.0, 10, 0.5),
        (8, 1e-3, 1.0, 0, 0.5),
        (8, 1e-3, 1.0, 10, 1.0),
        (1e-3, 1e-5, 0.5, 10, 0.5),
        (8, 1e-3, 1.0, 10, 0.5, 3),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="Expected"):
        plan_noise(*arguments)


def test_a_study_of_everybody_has_the_noise_it_always_had():
    """README's figures: 7.98 of 8, with the statistics' noise 0.681 and the gradients' 2.153."""
    plan = plan_noise(8, 1e-3, 1.0, 10, 0.5)
    assert plan.statistics.noise_multiplier == pytest.approx(0.6808, rel=2e-3)
    assert plan.gradients.noise_multiplier == pytest.approx(2.1530, rel=2e-3)
    assert PrivacyFilter().of([plan.statistics, plan.gradients], 1e-3)[0] == pytest.approx(7.98, abs=0.005)
