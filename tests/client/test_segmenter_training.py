"""The segmenter's private steps at a site: one clip a patient, no statistic of patients, and who takes part."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.client import segmenter_training, training
from fedcmr.client.segmenter_training import (
    DrawnPatient,
    load_drawn_patients,
    nobody,
    segmenter_gradient,
    segmenter_learner,
)
from fedcmr.client.training import Execution, LocalSteps, private_steps, view_seed
from fedcmr.shared.case import LV, NOT_DRAWN, load_cases, save_case, write_index
from fedcmr.shared.privacy import Mechanism, clip_to_norm
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter
from fedcmr.shared.views import NETWORK_GRID, slice_pairs
from tests.conftest import make_case

CPU = Execution(torch.device("cpu"))
STEP = LocalSteps(learning_rate=2.0, num_views=2, seed=3, server_round=4)
SILENT = Mechanism(0.0, 1.0, 1, 1e-3, 1e-3, private=True, nominal_patients=4)


@pytest.fixture
def segmenter():
    return load_segmenter()


@pytest.fixture
def arrays(segmenter):
    return {name: value.detach().numpy().copy() for name, value in segmenter.trainable().items()}


def drawn(name, seed, num_slices=3):
    return DrawnPatient(name, *slice_pairs(make_case(name, "GE", seed, num_slices)))


def flat(update):
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def test_a_patient_with_sixty_slices_moves_the_segmenter_no_further_than_one_with_one(segmenter, arrays):
    learner = segmenter_learner(segmenter)
    others = [drawn("a", 1), drawn("b", 2)]
    without = flat(private_steps(learner, others, arrays, SILENT, STEP, CPU))
    for patient in (drawn("one", 3, 1), drawn("many", 4, 60)):
        with_one = flat(private_steps(learner, [*others, patient], arrays, SILENT, STEP, CPU))
        bound = STEP.learning_rate * SILENT.max_grad_norm / 4
        assert np.linalg.norm(with_one - without) == pytest.approx(bound, rel=1e-3), "the clip over the public number"


def test_a_step_is_the_mean_of_clipped_patient_gradients_over_the_public_number(segmenter, arrays):
    patients = [drawn("a", 1), drawn("b", 2)]
    update = flat(private_steps(segmenter_learner(segmenter), patients, arrays, SILENT, STEP, CPU))
    with segmenter.holding({name: torch.from_numpy(array) for name, array in arrays.items()}) as parameters:
        gradients = [
            segmenter_gradient(segmenter, p, 2, view_seed(3, 4, 0, p.name), list(parameters.values())) for p in patients
        ]
    expected = -2.0 * sum(clip_to_norm(gradient, 1e-3) for gradient in gradients) / 4
    np.testing.assert_allclose(update, expected, atol=1e-6)


def test_nothing_of_the_segmenter_moves_and_its_running_statistics_stay_the_public_ones(segmenter, arrays):
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    private_steps(segmenter_learner(segmenter), [drawn("a", 1)], arrays, SILENT, STEP, CPU)
    after = segmenter.state_dict()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any("running" in name or "num_batches" in name for name in arrays), "nor do they travel"
    assert sum(array.size for array in arrays.values()) < 1000


def test_a_segmenter_that_would_use_statistics_of_its_batch_is_refused(segmenter):
    with pytest.raises(ValueError, match="evaluation mode"):
        segmenter_learner(segmenter.train())


def test_a_patients_gradient_does_not_depend_on_who_else_is_there(segmenter, arrays):
    parameters = list(segmenter.requires_grad_(True).trainable().values())
    patient = drawn("a", 1)
    alone = segmenter_gradient(segmenter, patient, 2, 0, parameters)
    segmenter_gradient(segmenter, drawn("b", 2), 2, 0, parameters)
    np.testing.assert_array_equal(segmenter_gradient(segmenter, patient, 2, 0, parameters), alone)


def test_a_private_step_computes_as_many_gradients_as_the_public_number(segmenter, arrays, monkeypatch):
    real, seen = segmenter_gradient, []
    monkeypatch.setattr(
        segmenter_training, "segmenter_gradient", lambda *given: seen.append(given[1].name) or real(*given)
    )
    private_steps(segmenter_learner(segmenter), [drawn("a", 1)], arrays, SILENT, STEP, CPU)
    assert sorted(seen) == ["", "", "", "a"]
    assert training.num_gradients(9, SILENT) == 9


def test_an_empty_patient_and_one_who_is_drawn_in_part_give_finite_gradients(segmenter):
    parameters = list(segmenter.requires_grad_(True).trainable().values())
    part = drawn("a", 1)
    part = replace(part, masks=torch.where(part.masks == LV, part.masks, NOT_DRAWN))
    for patient in (nobody(NETWORK_GRID), part):
        assert np.isfinite(segmenter_gradient(segmenter, patient, 2, 0, parameters)).all()


def test_who_is_drawn_whole_or_in_part_takes_part_and_whom_a_program_labelled_does_not(tmp_path):
    """Contours that a program found would teach what the program already says."""
    cases = [make_case(f"p{number}", "GE", number) for number in range(4)]
    part = cases[1].masks.copy()
    part[part != LV] = NOT_DRAWN
    cases[1] = replace(cases[1], masks=part)
    cases[2] = replace(cases[2], info=replace(cases[2].info, contours="auto"))
    cases[3] = replace(cases[3], info=replace(cases[3].info, group="p0"))
    for case in cases:
        save_case(tmp_path, case)
    write_index(tmp_path, [case.info for case in cases])
    assert len(load_cases(tmp_path)) == 4
    patients = load_drawn_patients(tmp_path, NETWORK_GRID, ("GE",))
    assert {patient.name: len(patient.images) for patient in patients} == {"p0": 6, "p1": 3}, "scanned twice: one item"
    assert load_drawn_patients(tmp_path, NETWORK_GRID, ("Siemens",)) == []
