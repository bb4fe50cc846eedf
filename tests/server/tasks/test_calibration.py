import math

import numpy as np
import pytest
import torch

from fedcmr.server.settings import RegressionConfig
from fedcmr.server.tasks.ejection_fraction import calibration
from fedcmr.server.tasks.ejection_fraction.calibration import calibrate, train_calibrated
from fedcmr.server.tasks.ejection_fraction.examples import prepare_examples
from fedcmr.shared.tasks.ejection_fraction import inference
from fedcmr.shared.tasks.ejection_fraction.inference import Predictions, of_stack, predict, stack_predictions
from fedcmr.shared.tasks.ejection_fraction.network import Prediction, Regressor, load_regressor, save_regressor
from tests.server.disc_case import disc_case

CONFIG = RegressionConfig(num_steps=12, batch_size=4, learning_rate=1e-3, ema_decay=0.9, num_tta=2)


@pytest.fixture(scope="module")
def cases():
    return [disc_case(f"p{i}", ef, num_slices=5 + i % 3, seed=i) for i, ef in enumerate((0.2, 0.35, 0.5, 0.65))]


def test_areas_are_summed_over_the_stack_and_middle_slices_predict():
    rng = np.random.default_rng(0)
    ef, ed, es = (torch.from_numpy(rng.uniform(0.1, 0.4, 6)) for _ in range(3))
    slices = Prediction(ef, ed, es)
    volumes = [sum(float(area) for area in areas) for areas in (ed, es)]
    assert of_stack(slices, slice(1, 5), 1.0) == pytest.approx(1 - volumes[1] / volumes[0])
    assert of_stack(slices, slice(1, 5), 0.0) == pytest.approx(sum(ef[1:5].tolist()) / 4)
    both = of_stack(slices, slice(1, 5), 0.25)
    assert both == pytest.approx(0.25 * (1 - volumes[1] / volumes[0]) + 0.75 * ef[1:5].mean().item())


def test_a_stack_without_a_cavity_has_a_prediction():
    nothing = torch.zeros(3)
    assert of_stack(Prediction(nothing, nothing, nothing), slice(0, 3), 1.0) == 1.0
    assert of_stack(Prediction(nothing, nothing, nothing + 1), slice(0, 3), 1.0) == 0.0


@pytest.mark.parametrize("area_share", [0.0, 0.5])
def test_patients_of_unequal_stacks_are_read_each_by_their_own_slices(cases, tiny, area_share):
    torch.manual_seed(0)
    model = Regressor(area_share=area_share)
    together = stack_predictions(model, cases, num_tta=3)
    alone = [stack_predictions(model, [case], num_tta=3)[0] for case in cases]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(predict(model, cases, 3).ef, together.mean(axis=1))
    assert predict(model, [], num_tta=1).ef.shape == (0,)


def test_without_rotations_the_prediction_is_the_mean_of_the_middle_slices(cases, tiny):
    torch.manual_seed(0)
    model = Regressor().eval()
    images = prepare_examples(cases[:1]).images
    with torch.no_grad():
        assert predict(model, cases[:1], num_tta=1).ef[0] == pytest.approx(model(images).ef.mean().item(), abs=1e-5)


def test_calibration_finds_the_spread_that_errors_follow(monkeypatch):
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.01, 0.1, 4000)
    true = rng.uniform(0.2, 0.7, 4000)
    centre = true + rng.normal(0, np.hypot(0.02, 1.5 * spread))
    predictions = centre[:, None] + spread[:, None] * np.array([-1.0, 1.0])
    for module in (calibration, inference):  # of the calibration, and of the prediction
        monkeypatch.setattr(module, "stack_predictions", lambda *_: predictions)
    model = Regressor()
    calibrate(model, [], true, num_tta=2)
    assert model.sd_floor.item() == pytest.approx(0.02, abs=0.006)
    assert model.sd_gain.item() == pytest.approx(1.5, rel=0.07)
    found = predict(model, [], num_tta=2)
    assert np.mean(np.abs(found.ef - true) < 1.96 * found.sd) == pytest.approx(0.95, abs=0.01)


def test_an_uncalibrated_network_does_not_tell_how_sure_it_is(cases, tiny):
    assert np.isnan(predict(Regressor(), cases, 2).sd).all()


def test_calibration_patients_train_nothing_where_there_are_enough(cases, tiny, monkeypatch):
    seen = {}

    def note(name, function):
        def noted(model_or_cases, *arguments, **options):
            patients = arguments[0] if name == "calibrated" else model_or_cases
            seen[name] = {case.info.pseudonym for case in patients}
            return function(model_or_cases, *arguments, **options)

        monkeypatch.setattr(calibration, function.__name__, noted)

    note("trained", calibration.train_regressor)
    note("calibrated", calibration.calibrate)
    model = train_calibrated(cases, CONFIG, seed=1)
    assert seen["trained"] == seen["calibrated"] == {case.info.pseudonym for case in cases}
    assert math.isfinite(model.sd_floor) and math.isfinite(model.sd_gain)
    monkeypatch.setattr(calibration, "MIN_TO_HOLD_OUT", 4)
    monkeypatch.setattr(calibration, "HELD_OUT_SHARE", 0.25)
    train_calibrated(cases, CONFIG, seed=1)
    assert len(seen["calibrated"]) == 1 and len(seen["trained"]) == 3 and not seen["calibrated"] & seen["trained"]


def test_what_a_network_knows_of_its_errors_is_saved_with_it(cases, tiny, tmp_path):
    model = train_calibrated(cases, RegressionConfig(num_steps=3, batch_size=4, num_tta=2, area_share=0.5), seed=1)
    save_regressor(tmp_path / "model.safetensors", model)
    found, again = (predict(m, cases, 2) for m in (model, load_regressor(tmp_path / "model.safetensors")))
    assert isinstance(again, Predictions)
    np.testing.assert_array_equal(found.sd, again.sd)
    np.testing.assert_array_equal(found.ef, again.ef)
