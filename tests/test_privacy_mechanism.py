"""What the guarantee rests on, through the code that a site really runs: clip, noise, sampling, divisor."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest

from fedcmr.client import training
from fedcmr.client.training import Execution, LocalSteps, Patient, fine_tune, statistics
from fedcmr.shared import privacy
from fedcmr.shared import style_statistics as shared_statistics
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.shape import SHAPE_NAMES
from fedcmr.shared.style import style_vector

CPU = Execution(torch.device("cpu"))
CLIP = 0.05
SILENT = Mechanism(0.0, 1.0, 1, CLIP, 1e-3, private=True, nominal_patients=8)
STEP = LocalSteps(learning_rate=0.5, num_views=4, seed=7, server_round=2)


@pytest.fixture
def arrays(prior):
    return {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}


@pytest.fixture
def patient_of(prior):
    """`patient_of(name, num_slices)`: random images, and the style vector that a site would compute from them."""

    def make(name: str, num_slices: int, scale: float = 1.0) -> Patient:
        rng = torch.Generator().manual_seed(num_slices)
        images = scale * (torch.rand(num_slices, 2, 64, 64, generator=rng) * 2 - 1)
        masks = torch.randint(0, 4, (num_slices, 2, 64, 64), generator=rng).to(torch.uint8)
        styles = prior.standardise(style_vector(images, masks))[None]
        return Patient(name, images, masks, styles, torch.zeros(num_slices, dtype=torch.int64))

    return make


def flat(update):
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


@pytest.mark.parametrize("num_slices", [1, 10, 500])
def test_a_patient_moves_the_sum_of_gradients_by_at_most_the_clip(prior, arrays, patient_of, num_slices):
    others = [patient_of(f"p{number}", 3) for number in range(2)]
    patient = patient_of("extra", num_slices)
    with_patient, without = (
        flat(fine_tune(prior.generator, patients, arrays, SILENT, STEP, CPU))
        for patients in ([*others, patient], others)
    )
    moved = np.linalg.norm(with_patient - without) / STEP.learning_rate * SILENT.nominal_patients
    assert moved <= CLIP * (1 + 1e-4), "float32 of the wire allowed for"
    assert moved > 0.99 * CLIP, "nothing was clipped: the bound was not put to the test"


@pytest.mark.parametrize("with_shape", [False, True], ids=["style", "style and shape"])
@pytest.mark.parametrize("num_slices", [1, 10, 500])
def test_a_patient_moves_each_look_at_the_codes_by_at_most_its_clip(monkeypatch, patient_of, num_slices, with_shape):
    """The sums before noise, as `statistics` asks for them; the second step's centre is public and held fixed."""
    clip = 0.5
    sums = []

    def spy(per_patient, clip, noise_multiplier, dimension, rng):
        sums.append((original(list(per_patient), clip, 0.0, dimension, None), clip))
        return np.zeros(dimension)  # what was released: the same for both neighbours

    original = privacy.private_sum
    monkeypatch.setattr(privacy, "private_sum", spy)
    others = [patient_of(f"p{number}", 3) for number in range(3)]
    mechanism = replace(SILENT, max_grad_norm=clip, noise_multiplier=1.0)
    extra = replace(patient_of("extra", num_slices), shapes=torch.full((1, len(SHAPE_NAMES)), 3.0))
    statistics([*others, extra], mechanism, [8], with_shape)
    statistics(others, mechanism, [8], with_shape)
    assert len(sums) == 2 * shared_statistics.NUM_STEPS
    for (with_patient, look_clip), (without, _) in zip(sums[:2], sums[2:], strict=True):
        assert 0 < np.linalg.norm(with_patient - without) <= look_clip * (1 + 1e-9)
    assert sums[0][1] == clip and np.linalg.norm(sums[0][0] - sums[2][0]) > 0.99 * clip


@pytest.mark.slow
@pytest.mark.parametrize("num_patients", [0, 3])
def test_the_noise_of_a_site_has_the_promised_spread_and_shape(prior, arrays, patient_of, num_patients):
    """With patients too: less what they add without noise, the rest is the noise, and the same."""
    patients = [patient_of(f"p{number}", 2) for number in range(num_patients)]
    sigma, start = 3.0, flat(fine_tune(prior.generator, patients, arrays, SILENT, STEP, CPU))
    noisy = replace(SILENT, noise_multiplier=sigma)
    num_draws = math.ceil(3000 / start.size)
    draws = np.array([flat(fine_tune(prior.generator, patients, arrays, noisy, STEP, CPU)) for _ in range(num_draws)])
    standard = (draws - start) / (STEP.learning_rate * sigma * CLIP / SILENT.nominal_patients)
    assert standard.std() == pytest.approx(1, abs=6 / math.sqrt(2 * standard.size))  # six standard errors
    assert kstest(standard.ravel(), "norm").pvalue > 1e-6


def test_two_sites_of_equal_seeds_and_data_differ_in_their_noise(prior, arrays, patient_of):
    patients = [patient_of("p0", 2)]
    noisy = replace(SILENT, noise_multiplier=1.0)
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        updates.append(
            (
                flat(fine_tune(prior.generator, patients, arrays, noisy, STEP, CPU)),
                *statistics(patients, noisy, [8]).values(),
            )
        )
    for first, second in zip(*updates, strict=True):
        assert not np.isclose(first, second, rtol=1e-6, atol=0).any()


@pytest.fixture
def batches(monkeypatch):
    """The (number of vectors, expected batch) of every private step, with gradients that cost nothing."""
    seen = []

    def spy(gradients, *args, expected_batch_size, **kwargs):
        seen.append((len(list(gradients)), expected_batch_size))
        return np.zeros(kwargs["dimension"])

    monkeypatch.setattr(training, "private_mean_gradient", spy)
    monkeypatch.setattr(training, "patient_gradient", lambda *_: np.zeros(1))
    return seen


def test_the_number_of_patients_in_a_step_is_binomial(prior, arrays, patient_of, batches):
    patients = [replace(patient_of("p", 1), name=f"p{number}") for number in range(6)]
    mechanism = replace(SILENT, sample_rate=0.3, noise_multiplier=1.0)
    fine_tune(prior.generator, patients, arrays, replace(mechanism, num_steps=2000), STEP, CPU)
    observed = np.bincount([size for size, _ in batches], minlength=7)
    expected = 2000 * binom.pmf(np.arange(7), 6, 0.3)
    common = expected > 5
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert chisquare(observed, expected).pvalue > 1e-6
    assert min(size for size, _ in batches) == 0, "an empty step is a step"


def test_the_divisor_is_the_same_whoever_is_there(prior, arrays, patient_of, batches):
    mechanism = replace(SILENT, sample_rate=0.5, noise_multiplier=1.0)
    for num_patients in (0, 1, 5, 20):
        patients = [replace(patient_of("p", 1), name=f"p{number}") for number in range(num_patients)]
        fine_tune(prior.generator, patients, arrays, replace(mechanism, num_steps=3), STEP, CPU)
    assert {expected for _, expected in batches} == {0.5 * 8}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_images_without_a_number_release_finite_updates(prior, arrays, patient_of, value):
    broken = patient_of("p0", 2)
    broken = replace(broken, images=torch.full_like(broken.images, value), styles=torch.full_like(broken.styles, value))
    noisy = replace(SILENT, noise_multiplier=1.0)
    assert np.isfinite(flat(fine_tune(prior.generator, [broken], arrays, noisy, STEP, CPU))).all()
    assert all(np.isfinite(array).all() for array in statistics([broken], noisy, [8]).values())
