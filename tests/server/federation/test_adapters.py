"""Every adapter's noise meets the target exactly, and the choice follows from public numbers."""

import math

import numpy as np
import pytest

from fedcmr.server.federation.adapters import LEAST_SIGNAL, choose_adapter, plan_adapter, signal_to_noise
from fedcmr.server.settings import PrivacyConfig
from fedcmr.shared.privacy import Release, epsilon

SIZES = {"norm_affine": 392, "lora": 2048}


@pytest.mark.parametrize("adapter", ["statistics", "norm_affine"])
@pytest.mark.parametrize(
    "privacy",
    [
        PrivacyConfig(),
        PrivacyConfig(target_epsilon=1.0, target_delta=1e-4),
        PrivacyConfig(target_epsilon=3.0, statistics_share=0.2),
    ],
)
def test_an_adapters_plan_spends_the_target_and_no_more(adapter, privacy):
    plan = plan_adapter(adapter, privacy, 10)
    spent, _ = epsilon(list(plan.values()), privacy.target_delta)
    assert 0.985 * privacy.target_epsilon <= spent <= privacy.target_epsilon
    assert (plan["statistics"].num_steps, plan["statistics"].sample_rate) == (2, 1.0)
    assert set(plan) == ({"statistics"} if adapter == "statistics" else {"statistics", "gradients"})


def test_the_whole_budget_for_the_statistics_means_less_noise():
    alone, shared = (
        plan_adapter(adapter, PrivacyConfig(), 10)["statistics"] for adapter in ("statistics", "norm_affine")
    )
    assert alone.noise_multiplier == pytest.approx(shared.noise_multiplier * math.sqrt(0.5), rel=0.01)


def test_signal_to_noise_is_that_of_a_simulated_federation():
    """Against sums of noise, drawn as the sites and the server would, for sites of unequal size."""
    release, sizes, dimension = Release(2.0, 0.5, 6), [10, 20, 40], 500
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(200):
        steps = [sum(rng.normal(0, 2.0 / (0.5 * size), dimension) for size in sizes) / len(sizes) for _ in range(6)]
        lengths.append(np.linalg.norm(np.sum(steps, axis=0)))
    assert signal_to_noise(release, sizes, dimension) == pytest.approx(6 / np.mean(lengths), rel=0.02)


def test_at_a_given_epsilon_the_number_of_steps_hardly_matters():
    signals = [
        signal_to_noise(plan_adapter("norm_affine", PrivacyConfig(), n)["gradients"], [40] * 3, 392)
        for n in (1, 10, 50)
    ]
    assert max(signals) / min(signals) < 1.02


def test_more_patients_sites_or_epsilon_never_lower_the_adapter():
    order = ["statistics", "norm_affine", "lora"]
    for epsilons, sizes in (
        ([0.1, 0.5, 1, 3, 8, 50], [[20] * 3]),
        ([1], [[n] * 3 for n in (5, 20, 40, 1000)]),
        ([1], [[20] * n for n in (1, 2, 4, 8, 30)]),
    ):
        chosen = [
            choose_adapter(
                "auto", plan_adapter("norm_affine", PrivacyConfig(target_epsilon=e), 10)["gradients"], s, SIZES
            )[0]
            for e in epsilons
            for s in sizes
        ]
        assert chosen == sorted(chosen, key=order.index)
        assert len(set(chosen)) > 1


def test_a_setting_decides_and_no_noise_takes_the_highest():
    noisy = Release(1e6, 1.0, 1)
    adapter, why = choose_adapter("lora", noisy, [5], SIZES)
    assert adapter == "lora" and why.endswith("as federation.adapter says")
    assert choose_adapter("auto", noisy, [5], SIZES)[0] == "statistics"
    adapter, why = choose_adapter("auto", None, [5], SIZES)
    assert adapter == "lora" and "without privacy" in why


def test_the_reason_gives_the_ratios_and_the_threshold():
    release = plan_adapter("norm_affine", PrivacyConfig(), 10)["gradients"]
    _, why = choose_adapter("auto", release, [40, 40, 40], SIZES)
    signal = signal_to_noise(release, [40, 40, 40], 392)
    assert f"{signal:.2f} with norm_affine, which needs {LEAST_SIGNAL['norm_affine']:g}" in why
    assert "low-rank updates" in why and "worth their noise" in why, "and what they mean"
    _, why = choose_adapter("auto", Release(1e6, 1.0, 1), [5], SIZES)
    assert "style statistics" in why and "little but noise" in why


def test_the_default_studies_can_pay_for_low_rank_updates_and_a_small_strict_one_cannot():
    for target, sizes, expected in ((8, [40] * 3, "lora"), (1, [40] * 3, "lora"), (1, [20] * 2, "statistics")):
        release = plan_adapter("norm_affine", PrivacyConfig(target_epsilon=target), 10)["gradients"]
        assert choose_adapter("auto", release, sizes, SIZES)[0] == expected
