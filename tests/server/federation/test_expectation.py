"""What a study is told to expect holds when it is tried: noise, sampling and power against simulations of them."""

from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.federation.expectation import (
    PAIRED_SD_POINTS,
    SPREAD,
    expectations,
    expected,
    num_test_patients,
)
from fedcmr.server.federation.federate import federate
from fedcmr.server.federation.state import StudySite, initial_state, make_request
from fedcmr.shared.style_statistics import two_step_mean
from tests.server.federation.test_strategy import ScriptedGrid, agree

SITES = {"a": StudySite({"GE": 45}, 45), "b": StudySite({"GE": 20, "Philips": 30}, 50)}


@pytest.mark.parametrize("shape", [False, True])
def test_the_error_is_that_of_released_means(make_study, prior, shape):
    config = make_study(num_patients=0).config
    config.federation.shape = shape
    state = initial_state(config, prior, SITES)
    found = expectations(state, config, SITES)
    request, rng = make_request(config, state, 1), np.random.default_rng(0)
    size, errors = (24 if shape else 11), []
    for _ in range(200):
        sites = {number: SPREAD * rng.standard_normal((number, size)) for number in (45, 20)}
        clip, noise = request.max_grad_norm, request.noise_multiplier
        means = [two_step_mean(styles, clip, noise, number, rng)[0] for number, styles in sites.items()]
        errors.append(np.mean(means, axis=0))
    assert np.std(errors) == pytest.approx(found["GE"].error, rel=0.1)
    assert found["GE"].num_patients == 65 and found["Philips"].num_patients == 30
    assert shape or found["GE"].by_noise < found["GE"].by_chance


def test_without_noise_only_chance_is_left_and_more_patients_teach_more(make_study, prior):
    config = make_study(num_patients=0).config
    state = initial_state(config, prior, SITES)
    config.privacy.enabled = False
    plain = initial_state(config, prior, SITES)
    open_found, found = (expectations(s, config, SITES)["GE"] for s in (plain, state))
    assert open_found.by_noise == 0 and open_found.learnt > found.learnt
    few, many = (replace(found, by_chance=SPREAD / n**0.5, by_noise=5 / n).learnt for n in (20, 1000))
    assert few < many < 1


def test_the_number_of_test_patients_finds_the_difference_four_times_in_five():
    number, rng = num_test_patients(1.0), np.random.default_rng(1)
    differences = 1.0 + PAIRED_SD_POINTS * rng.standard_normal((4000, number))
    z = differences.mean(axis=1) / (PAIRED_SD_POINTS / np.sqrt(number))
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.03)
    assert num_test_patients(0.5) == pytest.approx(4 * number, abs=4)


def test_a_study_says_before_its_first_round_what_to_expect(make_study, prior):
    study = make_study("federation.adapter=statistics", num_patients=0)
    federate(ScriptedGrid(agree()), study, prior)
    log = (study.path / "log.txt").read_text()
    assert log.index("test patients to be seen") < log.index("round 1 of 1")
    config = study.config
    config.federation.shape = True
    assert "mean style and shape" in expected(initial_state(config, prior, SITES), config, SITES)[0]
