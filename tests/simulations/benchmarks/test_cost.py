"""The cost benchmark compares like with like."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.client.training import Execution, LocalSteps, fine_tune, patient_gradient, view_seed
from fedcmr.server.federation.state import make_request
from fedcmr.server.settings import load
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.records import GRADIENTS, STATISTICS
from fedcmr.simulations.benchmarks.cost import (
    CPU,
    GRADIENT_ADAPTERS,
    bytes_per_round,
    mechanism,
    pair_seconds,
    simulated_patients,
    step_seconds,
    study_of_one_site,
)

SMALL = ("federation.num_views=2", "synthesis.num_steps=1", "synthesis.num_slices=3", "device=cpu")


@pytest.mark.parametrize("adapter", GRADIENT_ADAPTERS)
def test_both_loops_see_the_same_views_and_the_clip_is_all_that_differs(prior, adapter):
    """With a clip that clips nothing and no noise, the private step is the plain one."""
    config = load("default", SMALL)
    patients = simulated_patients(3, prior, 3)
    assert all(torch.isfinite(patient.styles).all() and len(patient.images) for patient in patients)
    settings, state, sites = study_of_one_site(prior, patients, config, adapter)
    start, steps = state.arrays, LocalSteps.of(make_request(settings, state, 2, sites))
    private = mechanism(config, 3)
    loose = replace(private, max_grad_norm=1e9, noise_multiplier=0.0)
    plain = replace(loose, private=False)
    one, other = (fine_tune(prior.generator, patients, start, m, steps, Execution(CPU)) for m in (loose, plain))
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], atol=1e-6)
    with prior.generator.holding({name: torch.from_numpy(array) for name, array in start.items()}) as parameters:
        gradients = [
            patient_gradient(
                prior.generator,
                patient,
                2,
                view_seed(steps.seed, steps.server_round, 0, patient.name),
                list(parameters.values()),
            )
            for patient in patients
        ]
    flat = np.concatenate([one[name].ravel() for name in start])
    np.testing.assert_allclose(flat, -steps.learning_rate * np.mean(gradients, axis=0), atol=1e-5)


def test_figures_are_complete(tiny_prior):
    prior = load_prior(tiny_prior)
    config = load("default", SMALL)
    patients = simulated_patients(2, prior, 3)
    step = step_seconds(prior, patients, config, "norm_affine", num_repeats=2)
    assert [len(values) for values in step["seconds_of_every_repeat"].values()] == [2, 2, 2]
    assert min(step["seconds"].values()) > 0
    assert step["ratio_to_one_batch"] == step["seconds"]["private"] / step["seconds"]["one_batch"]
    made = pair_seconds(prior, config, num_cases=2)
    assert made["pairs"] == 6 and made["seconds_per_pair"] > 0


@pytest.mark.parametrize("adapter", GRADIENT_ADAPTERS)
def test_bytes_are_the_numbers_and_little_more(tiny_prior, adapter):
    prior = load_prior(tiny_prior)
    sizes = bytes_per_round(prior, simulated_patients(2, prior, 3), load("default", SMALL), adapter)
    arrays = study_of_one_site(prior, [], load("default", SMALL), adapter)[1].arrays
    numbers = 4 * sum(array.size for array in arrays.values())
    assert numbers < sizes[GRADIENTS]["up"] < numbers + 256 * len(arrays) + 256
    assert sizes[GRADIENTS]["down"] > sizes[GRADIENTS]["up"]
    assert 4 * 2 * len(prior.style_mean) < sizes[STATISTICS]["up"] < 4 * 2 * len(prior.style_mean) + 1024
