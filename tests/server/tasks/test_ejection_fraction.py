import math

import numpy as np
import pytest
import torch

from fedcmr.server.settings import AugmentationConfig, RegressionConfig
from fedcmr.server.tasks.ejection_fraction import training as regression
from fedcmr.server.tasks.ejection_fraction.examples import prepare_examples
from fedcmr.server.tasks.ejection_fraction.saliency import saliency_share
from fedcmr.server.tasks.ejection_fraction.training import batch_indices, regression_loss
from fedcmr.server.training.augmentation import augment_pairs, blur
from fedcmr.server.training.state import TrainingState
from fedcmr.shared import checkpoint
from fedcmr.shared.case import LV, NOT_DRAWN, Case, CaseInfo
from fedcmr.shared.errors import UserError
from fedcmr.shared.tasks.ejection_fraction.network import FORMAT, Prediction, Regressor, load_regressor, save_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import middle_slices, patient_ef
from fedcmr.shared.tasks.segmentation.teaching import is_segmented
from fedcmr.shared.views import warp
from tests.server.disc_case import disc_case

OFF = AugmentationConfig(0, 0, 0, False, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [disc_case(f"p{i}", ef, num_slices=5 + i % 3, seed=i) for i, ef in enumerate((0.2, 0.35, 0.5, 0.65))]


CONFIG = RegressionConfig(num_steps=12, batch_size=4, learning_rate=1e-3, ema_decay=0.9, num_tta=2)


def weights(model) -> list[torch.Tensor]:
    return [value.nan_to_num() for value in model.state_dict().values()]


@pytest.mark.parametrize(
    ("num", "expected"), [(1, (0, 1)), (2, (0, 1)), (5, (1, 4)), (6, (1, 5)), (8, (1, 6)), (10, (2, 8)), (15, (3, 12))]
)
def test_middle_slices_are_central_and_depend_on_the_count_alone(num, expected):
    assert (middle_slices(num).start, middle_slices(num).stop) == expected


def test_patient_ef_is_the_row_s_and_else_the_masks():
    case = disc_case("a", 0.4)
    assert patient_ef(case) == 0.4
    unlabelled = Case(CaseInfo("a", "GE", 3.0, math.nan, "a"), case.frames, case.masks, case.spacing_mm)
    at_ed, at_es = ((case.masks[phase] == LV).sum() for phase in (0, 1))
    assert patient_ef(unlabelled) == pytest.approx(1 - at_es / at_ed)
    blank = Case(unlabelled.info, case.frames, np.zeros_like(case.masks), case.spacing_mm)
    assert math.isnan(patient_ef(blank))


def test_cases_without_any_ejection_fraction_are_refused_in_one_line():
    case = disc_case("a", 0.4)
    blank = Case(CaseInfo("a", "GE", 3.0, math.nan, "a"), case.frames, np.zeros_like(case.masks), case.spacing_mm)
    with pytest.raises(UserError, match="none of the 1 training cases"):
        prepare_examples([blank])


def test_areas_are_fractions_of_the_image_and_unknown_without_masks():
    case = disc_case("a", 0.5)
    blank = Case(case.info, case.frames, np.zeros_like(case.masks), case.spacing_mm)
    examples = prepare_examples([case, blank])
    expected = [(case.masks[phase, 0] == LV).mean() for phase in (0, 1)]
    assert examples.areas[0].tolist() == pytest.approx(expected)
    assert examples.areas[4:].isnan().all() and examples.ef.eq(0.5).all()


def test_the_area_of_a_cavity_that_nobody_drew_is_unknown_and_not_zero():
    case = disc_case("a", 0.5)
    masks = np.where(case.masks == LV, LV, NOT_DRAWN).astype(np.uint8)
    masks[1, 2] = NOT_DRAWN  # one slice of end-systole
    in_part = Case(case.info, case.frames, masks, case.spacing_mm)
    areas, whole = (prepare_examples([one], whole_stacks=True).areas for one in (in_part, case))
    assert areas.isnan().nonzero().tolist() == [[2, 1]]
    known = areas.isfinite()
    assert torch.equal(areas[known], whole[known])
    maps, labels = torch.ones(6, 64, 64), torch.from_numpy(masks).transpose(0, 1)
    assert all(math.isnan(share) for share in saliency_share(maps, labels))  # nobody knows where the heart ends
    assert not is_segmented(in_part)


def test_whole_stacks_teach_areas_everywhere_and_the_ejection_fraction_in_the_middle():
    case = disc_case("a", 0.5, num_slices=6)
    examples = prepare_examples([case], whole_stacks=True)
    assert len(examples.images) == 6 and examples.areas.isfinite().all()
    assert examples.ef.isfinite().tolist() == [False, True, True, True, True, False]
    assert len(prepare_examples([case]).images) == 4


def test_unknown_areas_teach_nothing():
    prediction = Prediction(*(torch.tensor([0.3, 0.4], requires_grad=True) for _ in range(3)))
    areas = torch.tensor([[math.nan, math.nan], [0.1, 0.2]])
    regression_loss(prediction, torch.tensor([0.5, 0.5]), areas).backward()
    assert prediction.area_ed.grad[0] == 0 and prediction.area_ed.grad[1] != 0
    assert prediction.ef.grad.ne(0).all()
    outside = Prediction(*(torch.tensor([0.3, 0.4], requires_grad=True) for _ in range(3)))
    regression_loss(outside, torch.tensor([math.nan, 0.5]), torch.full((2, 2), 0.1)).backward()
    assert outside.ef.grad[0] == 0 and outside.ef.grad[1] != 0


def test_every_example_is_seen_equally_often_and_order_changes_by_epoch():
    seen = torch.cat([batch_indices(10, 4, seed=0, step=step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert len(batch_indices(3, 8, seed=0, step=1)) == 8


def test_switched_off_augmentation_changes_nothing(cases):
    images = prepare_examples(cases).images
    same, growth = augment_pairs(images, OFF, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    assert growth.eq(1).all()


@pytest.mark.parametrize("name", list(AugmentationConfig.__dataclass_fields__))
def test_each_transform_alone_changes_images_and_stays_in_range(cases, name):
    images = prepare_examples(cases).images
    only = AugmentationConfig(**{**OFF.__dict__, name: getattr(AugmentationConfig(), name)})
    changed, _ = augment_pairs(images, only, torch.Generator().manual_seed(0))
    again, _ = augment_pairs(images, only, torch.Generator().manual_seed(0))
    assert not torch.allclose(changed, images, atol=1e-3) and torch.equal(changed, again)
    assert changed.min() >= -1 and changed.max() <= 1 and changed.isfinite().all()


def test_area_grows_with_the_square_of_the_zoom():
    case = disc_case("a", 0.3, num_slices=5)
    images = torch.from_numpy((case.masks == LV).astype(np.float32)).transpose(0, 1) * 2 - 1
    zoomed, growth = augment_pairs(
        images, AugmentationConfig(**{**OFF.__dict__, "log_scale": 0.3}), torch.Generator().manual_seed(1)
    )
    area, area_zoomed = ((image + 1).mean(dim=(2, 3)) for image in (images, zoomed))
    torch.testing.assert_close(area_zoomed / area, growth[:, None].expand(-1, 2), rtol=0.03, atol=0)


def test_warp_turns_shifts_and_mirrors_as_torch_does():
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, none, plain = torch.ones(2), torch.zeros(2), torch.ones(2, 2)
    turned = warp(images, none + math.pi / 2, one, torch.zeros(2, 2), plain)
    assert any(torch.allclose(turned, torch.rot90(images, k, (2, 3)), atol=1e-4) for k in (1, 3))
    shifted = warp(images, none, one, torch.tensor([[3.0, -2.0]] * 2), plain)
    torch.testing.assert_close(shifted[:, :, :-2, 3:], images[:, :, 2:, :-3], atol=1e-4, rtol=0)
    mirrored = warp(images, none, one, torch.zeros(2, 2), torch.tensor([[-1.0, 1.0]] * 2))
    torch.testing.assert_close(mirrored, images.flip(3), atol=1e-4, rtol=0)


def test_blur_keeps_the_mean_and_zero_keeps_the_image():
    images = torch.zeros(2, 2, 32, 32)
    images[:, :, 16, 16] = 1
    blurred = blur(images, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(blurred[0], images[0])
    assert blurred[1, 0].sum() == pytest.approx(1, abs=1e-5)
    expected = 1 / sum(math.exp(-(k**2) / 2) for k in range(-3, 4)) ** 2
    assert blurred[1, 0, 16, 16] == pytest.approx(expected, rel=1e-5)


def test_resumed_run_equals_an_uninterrupted_one(cases, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(regression, "CHECKPOINT_EVERY", 5)
    path = tmp_path / "state.safetensors"
    whole = regression.train_regressor(cases, CONFIG, seed=1, checkpoint=path)
    assert not path.exists()

    save = TrainingState.save

    def interrupted_save(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", interrupted_save)
    for _ in range(2):  # stops after steps 5 and 10
        with pytest.raises(KeyboardInterrupt):
            regression.train_regressor(cases, CONFIG, seed=1, checkpoint=path)
    monkeypatch.setattr(TrainingState, "save", save)
    resumed = regression.train_regressor(cases, CONFIG, seed=1, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_checkpoint_of_other_data_is_not_continued(cases, tiny, tmp_path):
    path = tmp_path / "state.safetensors"
    state = TrainingState(Regressor(), 0.0)
    state.save(path, "another training")
    assert not state.restore(path, "this training") and state.restore(path, "another training")
    fresh = regression.train_regressor(cases, CONFIG, seed=1)
    other = regression.train_regressor(cases, CONFIG, seed=1, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(weights(fresh), weights(other), strict=True))


def test_seeds_decide_weights_and_the_loss_is_reported(cases, tiny):
    lines = []
    first = regression.train_regressor(cases, CONFIG, seed=1, log=lambda step, loss: lines.append((step, loss)))
    again = regression.train_regressor(cases, CONFIG, seed=1)
    other = regression.train_regressor(cases, CONFIG, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))
    assert [step for step, _ in lines] == [12] and math.isfinite(lines[0][1])


def test_saved_regressor_predicts_the_same(cases, tiny, tmp_path):
    torch.manual_seed(0)
    model = Regressor(0.37).eval()
    save_regressor(tmp_path / "model.safetensors", model, {"vendors": ["GE"]})
    loaded = load_regressor(tmp_path / "model.safetensors")
    assert loaded.mean_ef.item() == pytest.approx(0.37)
    images = prepare_examples(cases).images
    with torch.no_grad():
        assert torch.equal(loaded(images).ef, model(images).ef)
    assert math.isnan(loaded.sd_floor)


def test_unusable_model_files_are_named(tmp_path, tiny):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="is missing"):
        load_regressor(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a readable"):
        load_regressor(path)
    TrainingState(Regressor(), 0.0).save(path, "x")
    with pytest.raises(UserError, match="not a regressor"):
        load_regressor(path)
    checkpoint.save(path, {"a": np.zeros(3)}, {"format": FORMAT})
    with pytest.raises(UserError, match="another network"):
        load_regressor(path)


@pytest.mark.slow
def test_resnet50_learns_one_batch_in_five_steps(cases):
    torch.manual_seed(0)
    model = Regressor(0.4)
    examples = prepare_examples(cases)
    images, ef, areas = examples.images, examples.ef, examples.areas
    state = TrainingState(model.train(), weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = regression_loss(model(images), ef, areas)
        losses.append(loss.item())
        state.step(loss, rate=3e-4, max_grad_norm=5.0, ema_decay=0.5)
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.ne(0).any() for p in [model.network.conv1.weight])
