import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.client import training
from fedcmr.client.training import (
    Execution,
    LocalSteps,
    Patient,
    cached_patients,
    fine_tune,
    load_patients,
    patient_gradient,
    statistics,
    view_seed,
)
from fedcmr.shared.case import load_cases, read_index, write_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.privacy import Mechanism, clip_to_norm
from fedcmr.shared.records import SHAPE_MEAN, SHAPE_SQUARE, STYLE_MEAN, STYLE_SQUARE
from fedcmr.shared.shape import SHAPE_NAMES, case_shape
from fedcmr.shared.style_statistics import noise_std
from fedcmr.shared.views import slice_pairs

CPU = Execution(torch.device("cpu"))
STEPS = LocalSteps(learning_rate=0.1, num_views=2, seed=7, server_round=2)
OPEN = Mechanism(0.0, 1.0, 2, 1.0, 1e-3, private=False, nominal_patients=4)
NOISY = Mechanism(2.0, 1.0, 2, 1e-3, 1e-3, private=True, nominal_patients=4)


@pytest.fixture
def patients():
    generator = torch.Generator().manual_seed(0)
    return [
        Patient(
            f"p{index}",
            torch.rand(3, 2, 64, 64, generator=generator) * 2 - 1,
            torch.randint(0, 4, (3, 2, 64, 64), generator=generator).to(torch.uint8),
            torch.randn(1, 11, generator=generator),
            torch.zeros(3, dtype=torch.int64),
        )
        for index in range(4)
    ]


@pytest.fixture
def arrays(prior):
    return {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}


def flat(update):
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def test_without_privacy_two_runs_are_equal_and_another_seed_is_not(prior, tiny_prior, patients, arrays):
    first = fine_tune(prior.generator, patients, arrays, OPEN, STEPS, CPU)
    again = fine_tune(load_prior(tiny_prior).generator, patients, arrays, OPEN, STEPS, CPU)
    other = fine_tune(prior.generator, patients, arrays, OPEN, LocalSteps(0.1, 2, seed=8, server_round=2), CPU)
    np.testing.assert_array_equal(flat(first), flat(again))
    assert np.abs(flat(first) - flat(other)).max() > 0


def test_with_privacy_no_seed_repeats_the_update(prior, patients, arrays):
    first = fine_tune(prior.generator, patients, arrays, NOISY, STEPS, CPU)
    again = fine_tune(prior.generator, patients, arrays, NOISY, STEPS, CPU)
    assert np.abs(flat(first) - flat(again)).max() > 0


def test_one_step_without_noise_is_the_mean_of_clipped_patient_gradients(prior, patients, arrays):
    steps = LocalSteps(learning_rate=0.5, num_views=2, seed=7, server_round=2)
    clip = 0.05
    mechanism = Mechanism(0.0, 1.0, 1, clip, 1e-3, private=True, nominal_patients=8)
    update = fine_tune(prior.generator, patients, arrays, mechanism, steps, CPU)
    gradients = [patient_gradient(prior.generator, p, 2, view_seed(7, 2, 0, p.name)) for p in patients]
    assert max(np.linalg.norm(gradient) for gradient in gradients) > clip, "nothing would be clipped"
    expected = -0.5 * sum(clip_to_norm(gradient, clip) for gradient in gradients) / 8
    np.testing.assert_allclose(flat(update), expected, atol=1e-6)


def test_without_privacy_a_step_differs_in_its_noise_alone(prior, patients, arrays):
    steps = LocalSteps(learning_rate=0.5, num_views=2, seed=7, server_round=2)
    silent = Mechanism(0.0, 1.0, 1, 0.05, 1e-3, private=True, nominal_patients=len(patients))
    private, public = (
        fine_tune(prior.generator, patients, arrays, mechanism, steps, CPU)
        for mechanism in (silent, replace(silent, private=False))
    )
    np.testing.assert_allclose(flat(private), flat(public), atol=1e-7)


def test_the_gradient_is_that_of_the_mean_loss_over_views(prior, patients, monkeypatch):
    """Views of one patient are averaged before anything is clipped: two equal views give one view's gradient."""
    monkeypatch.setattr(
        "fedcmr.client.training.augment_in_equal_time", lambda images, masks, rng, **how: (images, masks)
    )
    seen = []
    loss_at = prior.generator.loss_at

    def recorded(images, condition, t, noise):
        losses = loss_at(images, condition, t, noise)
        seen.append((images, condition, t, noise, losses.detach()))
        return losses

    monkeypatch.setattr(prior.generator, "loss_at", recorded)
    gradient = patient_gradient(prior.generator, patients[0], 4, seed=1)
    monkeypatch.undo()
    images, condition, t, noise, losses = seen[0]
    assert losses.shape == (4,)
    parameters = list(prior.generator.trainable().values())
    direct = torch.autograd.grad(
        _contiguous_mean_loss(prior.generator, images.contiguous(), condition, t, noise), parameters
    )
    reference = np.concatenate([piece.double().numpy().ravel() for piece in direct])
    assert np.linalg.norm(gradient - reference) < 0.05 * np.linalg.norm(reference)


def _contiguous_mean_loss(generator, images, condition, t, noise):
    """In float32, one view at a time."""
    norms = [m for m in generator.modules() if isinstance(m, torch.nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for norm in norms]
    losses = [
        generator.loss_at(images[i : i + 1], condition[i : i + 1], t[i : i + 1], noise[i : i + 1])
        for i in range(len(images))
    ]
    for hook in hooks:
        hook.remove()
    return torch.cat(losses).mean()


def test_a_patients_views_do_not_depend_on_who_else_is_sampled():
    assert view_seed(0, 2, 1, "p1") == view_seed(0, 2, 1, "p1")
    seeds = {view_seed(s, r, k, p) for s in (0, 1) for r in (1, 2) for k in (0, 1) for p in ("p1", "p2")}
    assert len(seeds) == 16


@pytest.mark.parametrize("adapter", ["norm_affine", "lora"])
def test_the_update_is_the_same_to_the_last_digit_on_any_number_of_cores(prior, patients, adapter):
    start = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable(adapter).items()}
    before, updates = torch.get_num_threads(), []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        try:
            updates.append(flat(fine_tune(prior.generator, patients, start, OPEN, STEPS, CPU)))
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(*updates)


@pytest.mark.slow
def test_an_empty_batch_still_takes_its_noise_step(prior, arrays):
    """Standard deviation: learning rate x noise multiplier x clip / nominal patients."""
    steps = LocalSteps(learning_rate=0.1, num_views=1, seed=0, server_round=1)
    update = flat(fine_tune(prior.generator, [], arrays, replace(NOISY, num_steps=50), steps, CPU))
    expected = 0.1 * 2.0 * 1e-3 / 4 * math.sqrt(50)
    assert np.std(update) == pytest.approx(expected, rel=0.3)


def test_a_patient_with_a_non_finite_image_counts_as_nothing(prior, patients, arrays):
    broken = Patient(
        "p9", torch.full((1, 2, 64, 64), torch.nan), patients[0].masks[:1], patients[0].styles, patients[0].vendors[:1]
    )
    mechanism = Mechanism(0.0, 1.0, 2, 1.0, 1e-3, private=True, nominal_patients=4)
    with_broken = fine_tune(prior.generator, [*patients, broken], arrays, mechanism, STEPS, CPU)
    without = fine_tune(prior.generator, patients, arrays, mechanism, STEPS, CPU)
    np.testing.assert_array_equal(flat(with_broken), flat(without))


@pytest.mark.parametrize("adapter", ["norm_affine", "lora"])
def test_the_update_has_the_adapters_names_and_the_generator_is_left_as_it_was(prior, tiny_prior, patients, adapter):
    start = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable(adapter).items()}
    update = fine_tune(prior.generator, patients, start, OPEN, STEPS, CPU)
    assert update.keys() == start.keys()
    assert all(np.abs(array).max() > 0 for array in update.values())
    before = load_prior(tiny_prior).generator.freeze(adapter)
    for name, value in prior.generator.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name


def test_one_adapters_training_leaves_nothing_for_the_next(prior, tiny_prior, patients, arrays):
    part = {name: np.full(value.shape, 0.1, np.float32) for name, value in prior.generator.trainable("lora").items()}
    fine_tune(prior.generator, patients, part, OPEN, STEPS, CPU)
    after = fine_tune(prior.generator, patients, arrays, OPEN, STEPS, CPU)
    alone = fine_tune(load_prior(tiny_prior).generator, patients, arrays, OPEN, STEPS, CPU)
    np.testing.assert_array_equal(flat(after), flat(alone))


def test_private_statistics_are_a_two_step_mean_with_the_sites_own_noise(patients):
    """The noise is the ledger's: its spread over releases is that of `fedcmr.shared.style_statistics.noise_std`."""
    # Little enough that the second step is not clipped for the first one's noise.
    mechanism = replace(NOISY, max_grad_norm=20.0, noise_multiplier=0.05)
    released = np.array([statistics(patients, mechanism, [4])[STYLE_MEAN] for _ in range(200)])
    assert released.std(axis=0).mean() == pytest.approx(noise_std(20.0, 0.05, 4)[0], rel=0.1)


def test_statistics_of_nobody_are_noise():
    mean, square = statistics([], replace(NOISY, max_grad_norm=4.0), [4]).values()
    assert mean.shape == square.shape == (1, 11) and np.isfinite(mean).all() and np.abs(mean).min() > 0


def test_statistics_without_privacy_are_numpys(patients):
    mean, square = statistics(patients, OPEN, [4]).values()
    styles = torch.stack([patient.styles for patient in patients]).numpy()
    np.testing.assert_allclose(mean, styles.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(square, (styles**2).mean(axis=0), atol=1e-6)
    assert mean.dtype == square.dtype == np.float32


def test_a_site_reads_its_patients_once_and_again_when_they_change(tmp_path, tiny_prior, prior, write_cases):
    write_cases(tmp_path, "GE", 2, seed=0)
    patients = cached_patients(tmp_path, tiny_prior)
    assert [patient.name for patient in patients] == ["p00", "p01"]
    assert patients[0].images.shape == (3, 2, 64, 64) and patients[0].styles.shape == (1, *prior.style_mean.shape)
    assert cached_patients(tmp_path, tiny_prior) is patients
    write_cases(tmp_path, "GE", 3, seed=0)
    assert len(cached_patients(tmp_path, tiny_prior)) == 3


def test_two_scans_of_one_patient_are_one_patient(tmp_path, prior, write_cases):
    write_cases(tmp_path, "GE", 3, seed=0)
    infos = read_index(tmp_path)
    write_index(tmp_path, [replace(info, group="g1" if info.pseudonym != "p01" else "g2") for info in infos])
    patients = load_patients(tmp_path, prior)
    assert {patient.name: len(patient.images) for patient in patients} == {"g1": 6, "g2": 3}


def test_a_missing_data_folder_is_a_users_error(tmp_path, prior):
    with pytest.raises(UserError):
        load_patients(tmp_path / "absent", prior)


# What does not depend on who is there


@pytest.fixture
def computed(monkeypatch):
    """Names of the patients whose gradients were computed; "" is nobody."""
    names = []
    real = training.patient_gradient

    def spy(generator, patient, *args):
        names.append(patient.name)
        return real(generator, patient, *args)

    monkeypatch.setattr(training, "patient_gradient", spy)
    return names


@pytest.mark.parametrize("num_patients", [0, 1, 4])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_step_computes_as_many_gradients_as_the_site_has_patients_in_public(
    prior, patients, arrays, computed, num_patients, sample_rate
):
    mechanism = replace(NOISY, sample_rate=sample_rate)
    fine_tune(prior.generator, patients[:num_patients], arrays, mechanism, STEPS, CPU)
    assert len(computed) == mechanism.num_steps * mechanism.nominal_patients
    if sample_rate == 1:
        assert sorted(set(computed) - {""}) == [patient.name for patient in patients[:num_patients]]


def test_a_full_site_computes_no_gradient_in_vain(prior, patients, arrays, computed):
    fine_tune(prior.generator, patients, arrays, NOISY, STEPS, CPU)
    fine_tune(prior.generator, patients[:2], arrays, OPEN, STEPS, CPU)
    assert "" not in computed


def test_the_gradient_of_nobody_is_thrown_away(prior, patients, arrays):
    steps = LocalSteps(learning_rate=0.5, num_views=2, seed=7, server_round=2)
    silent = Mechanism(0.0, 1.0, 1, 0.05, 1e-3, private=True, nominal_patients=8)
    update = fine_tune(prior.generator, [], arrays, silent, steps, CPU)
    assert not flat(update).any()


@pytest.mark.parametrize("failure", ["raises", "nan", "memory"])
def test_a_patient_whose_gradient_fails_counts_as_zero_and_is_told_to_the_site(
    prior, patients, arrays, monkeypatch, failure
):
    steps = LocalSteps(learning_rate=0.5, num_views=2, seed=7, server_round=2)
    silent = Mechanism(0.0, 1.0, 1, 0.05, 1e-3, private=True, nominal_patients=4)
    without = fine_tune(prior.generator, patients[1:], arrays, silent, steps, CPU)
    real = training.patient_gradient

    def broken(generator, patient, *args):
        gradient = real(generator, patient, *args)
        if patient.name == patients[0].name:
            if failure == "nan":
                return np.full_like(gradient, np.nan)
            raise MemoryError if failure == "memory" else RuntimeError("patient-4711")
        return gradient

    monkeypatch.setattr(training, "patient_gradient", broken)
    told = []
    update = fine_tune(prior.generator, patients, arrays, silent, steps, CPU, lambda: told.append(1))
    np.testing.assert_allclose(flat(update), flat(without), atol=1e-9)
    assert len(told) == (failure != "nan")


def test_work_past_its_deadline_is_given_up(prior, patients, arrays):
    before = {name: value.clone() for name, value in prior.generator.state_dict().items()}
    with pytest.raises(TimeoutError):
        fine_tune(prior.generator, patients, arrays, NOISY, STEPS, replace(CPU, max_seconds=0.0))
    assert all(torch.equal(value, before[name]) for name, value in prior.generator.state_dict().items())


def drawn_in_part(index: int) -> Patient:
    """As `patient_of` leaves one of whom no slice is drawn whole: four entries of the style are known."""
    measured = torch.zeros(1, 11, dtype=torch.bool)
    measured[0, :4] = True
    styles = torch.where(measured, torch.full((1, 11), 0.5), torch.zeros(1, 11))
    nothing = torch.zeros(0, 2, 64, 64)
    return Patient(f"q{index}", nothing, nothing.byte(), styles, torch.zeros(0, dtype=torch.int64), measured)


def test_patients_drawn_in_part_add_nothing_to_the_gradients(prior, patients, arrays):
    alone = fine_tune(prior.generator, patients, arrays, OPEN, STEPS, CPU)
    mixed = [drawn_in_part(0), *patients[:2], drawn_in_part(1), *patients[2:]]
    np.testing.assert_array_equal(flat(fine_tune(prior.generator, mixed, arrays, OPEN, STEPS, CPU)), flat(alone))
    failures = []
    everybody = replace(NOISY, sample_rate=1.0)
    fine_tune(prior.generator, mixed, arrays, everybody, STEPS, CPU, lambda: failures.append(1))
    assert not failures


def with_shape_of(patient: Patient, value: float) -> Patient:
    """A patient whose last two entries of the shape could not be measured."""
    shapes = torch.full((1, len(SHAPE_NAMES)), value)
    shapes[0, -2:] = math.nan
    return replace(patient, shapes=shapes)


def test_the_shape_is_released_behind_the_style_and_only_where_it_is_asked_for(patients):
    shaped = [with_shape_of(patient, 0.5 * number) for number, patient in enumerate(patients)]
    plain, found = statistics(shaped, OPEN, [4]), statistics(shaped, OPEN, [4], with_shape=True)
    assert set(plain) == {STYLE_MEAN, STYLE_SQUARE} and set(found) == {*plain, SHAPE_MEAN, SHAPE_SQUARE}
    np.testing.assert_allclose(found[STYLE_MEAN], plain[STYLE_MEAN], atol=1e-6)
    values = 0.5 * np.arange(len(patients))
    np.testing.assert_allclose(found[SHAPE_MEAN][0, :-2], values.mean(), atol=1e-6)
    np.testing.assert_allclose(found[SHAPE_SQUARE][0, :-2], (values**2).mean(), atol=1e-6)
    np.testing.assert_allclose(found[SHAPE_SQUARE][0, -2:], 1.0)  # as the public hearts are
    noisy = statistics(shaped, replace(NOISY, max_grad_norm=6.4), [4], with_shape=True)
    assert all(np.isfinite(array).all() for array in noisy.values())
    assert {name: array.shape for name, array in noisy.items()} == {
        STYLE_MEAN: (1, 11),
        STYLE_SQUARE: (1, 11),
        SHAPE_MEAN: (1, len(SHAPE_NAMES)),
        SHAPE_SQUARE: (1, len(SHAPE_NAMES)),
    }


def test_a_patients_shape_is_that_of_the_cases_masks(tmp_path, prior, write_cases):
    write_cases(tmp_path, "GE", 2, seed=3)
    loaded = load_patients(tmp_path, prior)
    for patient, case in zip(loaded, load_cases(tmp_path), strict=True):
        assert patient.name == case.info.group
        torch.testing.assert_close(patient.shapes[0], case_shape(case, *slice_pairs(case)), equal_nan=True)
    assert any(patient.shapes.isfinite().any() for patient in loaded)


def test_what_a_site_does_not_draw_is_released_as_the_public_prior_has_it():
    """Mean 0 and mean square 1, in standardised units; what is drawn is released as it is."""
    mean, square = statistics([drawn_in_part(index) for index in range(400)], OPEN, [400]).values()
    np.testing.assert_allclose(mean[0, :4], 0.5)
    np.testing.assert_allclose(square[0], [0.25] * 4 + [1.0] * 7)
    assert np.abs(mean[0, 4:]).max() < 4 / np.sqrt(400) and np.unique(mean[0, 4:]).size > 1
