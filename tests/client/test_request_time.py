"""What a site expects a request to take: measured on dummy patients, kept for a day, never a refusal by itself."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedcmr.client import request_time as pace
from fedcmr.client.request_time import KEPT_S, PACE_NAME, estimated_seconds
from fedcmr.client.training import Execution, LocalSteps, fine_tune, generator_learner
from fedcmr.shared.privacy import Mechanism

CPU = Execution(torch.device("cpu"))
STEPS = LocalSteps(learning_rate=0.1, num_views=2, seed=0, server_round=2)
MECHANISM = Mechanism(
    noise_multiplier=2.0, sample_rate=1.0, num_steps=2, max_grad_norm=1.0, target_delta=1e-3, nominal_patients=4
)


@pytest.fixture
def estimate(prior, tmp_path):
    def make(num_patients=4, num_steps=2, max_seconds=1e9, **changes):
        mechanism = replace(MECHANISM, num_steps=num_steps, nominal_patients=num_patients)
        execution = replace(CPU, max_seconds=max_seconds)
        learner, part = generator_learner(prior.generator), prior.generator.trainable()
        return estimated_seconds(tmp_path, learner, part, mechanism, replace(STEPS, **changes), execution)

    return make


@pytest.fixture
def measurements(monkeypatch):
    """What each measurement finds, in turn; the list is shorter by each that was made."""
    seconds = [3.0, 1.0, 1.0]
    monkeypatch.setattr(pace, "_wave_seconds", lambda *_: seconds.pop(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return seconds


@pytest.fixture
def clock(prior, monkeypatch):
    """Time that passes with the images that go through the generator, so that no other program slows it down."""
    clock = SimpleNamespace(now=0, perf_counter=lambda: clock.now, time=time.time)
    prior.generator.unet.register_forward_hook(lambda _, inputs, __: setattr(clock, "now", clock.now + len(inputs[0])))
    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return clock


def test_the_estimate_grows_with_the_work_and_is_near_the_truth(prior, estimate, clock):
    few, many = estimate(num_steps=2), estimate(num_steps=200)
    assert many == pytest.approx(100 * few)
    assert estimate(num_patients=4000) >= 500 * few
    assert estimate(num_views=64) > 4 * estimate(num_views=4)
    arrays = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    clock.now = 0
    fine_tune(prior.generator, [], arrays, replace(MECHANISM, num_steps=20), STEPS, CPU)
    assert estimate(num_steps=20) == pytest.approx(clock.now, rel=0.5)


def test_the_next_process_does_not_measure_again_for_a_day(estimate, measurements, monkeypatch, tmp_path):
    assert estimate() == estimate() == 3.0 * 2 * 2, "two steps of two waves"
    assert estimate(num_views=1) == 1.0 * 2 * 2, "another kind of work"
    assert (tmp_path / PACE_NAME).stat().st_mode & 0o077 == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + KEPT_S + 60)
    assert estimate() == 1.0 * 2 * 2 and not measurements


def test_nothing_is_refused_for_what_was_measured_on_a_busy_day(estimate, measurements):
    assert estimate() == 12.0
    assert estimate(max_seconds=5.0) == 4.0, "measured again, because the old figure would refuse"
    assert estimate(max_seconds=5.0) == 4.0 and len(measurements) == 1, "the new one counts from then on"


@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": 1}', '{"a": [1, "x"]}', "[" * 100_000, "\xff"])
def test_a_file_that_makes_no_sense_is_measured_over(estimate, measurements, tmp_path, content):
    (tmp_path / PACE_NAME).write_bytes(content.encode("latin-1"))
    assert estimate() == estimate() == 12.0 and len(measurements) == 2


def test_a_folder_that_cannot_be_written_costs_a_measurement_every_time(prior, measurements, tmp_path):
    missing = tmp_path / "missing"
    found = [
        estimated_seconds(
            missing, generator_learner(prior.generator), prior.generator.trainable(), MECHANISM, STEPS, CPU
        )
        for _ in range(2)
    ]
    assert found == [12.0, 4.0]
