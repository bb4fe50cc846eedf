"""Each vendor's style distribution from noisy statistics."""

from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.federation.vendor_styles import STYLE_STD_RANGE, vendor_styles
from fedcmr.shared.privacy import os_generator
from fedcmr.shared.style_statistics import noise_std, two_step_mean
from tests.wire_request import usual_request

QUIET = usual_request(
    task="statistics",
    server_round=1,
    private=False,
    noise_multiplier=0.0,
    max_grad_norm=4.0,
    local_steps=2,
    num_views=4,
)
NOISY = replace(QUIET, private=True, noise_multiplier=0.96)
VENDORS = {"a": "Siemens", "b": "Philips", "c": "GE"}
STDS = {"a": 0.3, "b": 0.4, "c": 0.5}


def statistics_of(mean, std, num=3):
    shape = (1, num)
    return {
        "style_mean": np.full(shape, mean, np.float32),
        "style_square": np.full(shape, std**2 + mean**2, np.float32),
    }


def sites(nominal):
    return {site: {vendor: nominal} for site, vendor in VENDORS.items()}


def test_without_noise_every_vendor_keeps_its_own_spread():
    styles = vendor_styles({s: statistics_of(0.5, STDS[s]) for s in STDS}, sites(40), QUIET)
    for site, vendor in VENDORS.items():
        np.testing.assert_allclose(styles[vendor][0], 0.5)
        np.testing.assert_allclose(styles[vendor][1], STDS[site], rtol=1e-5)


def test_sites_of_one_vendor_are_one_population():
    """Whose spread holds the distance between the sites."""
    updates = {"a": statistics_of(0.2, 0.5), "b": statistics_of(0.6, 0.5)}
    styles = vendor_styles(updates, {"a": {"GE": 40}, "b": {"GE": 40}, "c": {"Siemens": 40}}, QUIET)
    assert set(styles) == {"GE"}
    np.testing.assert_allclose(styles["GE"][0], 0.4, rtol=1e-6)
    np.testing.assert_allclose(styles["GE"][1], np.sqrt(0.25 + 0.04), rtol=1e-5)


def test_a_spread_stays_within_its_range():
    updates = {"a": statistics_of(0.0, 0.01), "b": statistics_of(0.0, 9.0)}
    styles = vendor_styles(updates, sites(40), QUIET)
    np.testing.assert_allclose([styles["Siemens"][1][0], styles["Philips"][1][0]], STYLE_STD_RANGE, rtol=1e-6)


@pytest.mark.parametrize("nominal", [20, 40])
def test_under_noise_spreads_are_nearer_to_the_truth_than_each_alone(nominal):
    rng = np.random.default_rng(0)
    patients = {site: rng.normal(0.5, std, (nominal, 11)) for site, std in STDS.items()}
    truth = np.array([patients[site].std(axis=0) for site in STDS])
    errors = {"together": [], "alone": []}
    for _ in range(60):
        released = {
            site: two_step_mean(styles, NOISY.max_grad_norm, NOISY.noise_multiplier, nominal, os_generator())
            for site, styles in patients.items()
        }
        updates = {
            site: {"style_mean": mean[None], "style_square": square[None]} for site, (mean, square) in released.items()
        }
        styles = vendor_styles(updates, sites(nominal), NOISY)
        together = np.array([styles[VENDORS[site]][1] for site in STDS])
        alone = np.sqrt(np.clip([square - mean**2 for mean, square in released.values()], 0.15**2, 1.5**2))
        errors["together"].append(np.sqrt(((together - truth) ** 2).mean()))
        errors["alone"].append(np.sqrt(((alone - truth) ** 2).mean()))
    assert np.mean(errors["together"]) < 0.9 * np.mean(errors["alone"])


def test_with_overwhelming_noise_all_spreads_are_one_and_the_means_are_public():
    updates = {"a": statistics_of(0.4, 0.3), "b": statistics_of(0.1, 0.5), "c": statistics_of(-0.3, 0.4)}
    styles = vendor_styles(updates, sites(40), replace(NOISY, noise_multiplier=50.0))
    np.testing.assert_allclose([styles[v][1] for v in VENDORS.values()], np.sqrt((0.09 + 0.25 + 0.16) / 3), rtol=1e-5)
    np.testing.assert_array_equal([styles[v][0] for v in VENDORS.values()], 0.0)


def test_means_are_drawn_to_the_public_mean_by_the_noises_share():
    """Against the formula: 1 - noise variance over the mean square, here of 0.5 in every entry."""
    styles = vendor_styles({s: statistics_of(0.5, 0.4) for s in STDS}, sites(20), NOISY)
    share = noise_std(NOISY.max_grad_norm, NOISY.noise_multiplier, 20)[0] ** 2 / 0.25
    assert 0.01 < share < 0.2
    np.testing.assert_allclose([styles[v][0] for v in VENDORS.values()], 0.5 * (1 - share), rtol=1e-5)
