"""The tasks' common interface, and segmentation from a folder of cases to its figures."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.cli import main
from fedcmr.server.evaluation.export import as_csv
from fedcmr.server.report.tidy_csv import tidy_rows
from fedcmr.server.settings import Config, SegmentationConfig, load
from fedcmr.server.tasks.registry import TASKS, task_of_model
from fedcmr.server.tasks.segmentation.examples import prepare_examples
from fedcmr.server.tasks.segmentation.scores import overlap_and_distance, score_masks
from fedcmr.server.tasks.segmentation.training import train_on_cases
from fedcmr.shared.case import ED, ES, LV, MYO, RV, load_cases, save_case
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, save_regressor
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.segmenter import SHIPPED_SEGMENTER, load_segmenter
from fedcmr.shared.tasks.segmentation.teaching import is_segmented
from fedcmr.shared.views import Grid

CPU = torch.device("cpu")
GRID = Grid(32, 4.0)
SMALL = SegmentationConfig(width=8, size_px=32, crop_px=32, pixel_mm=4.0, num_steps=3, batch_size=2)
SETTINGS = [
    "--set",
    "segmentation.num_steps=2",
    "segmentation.batch_size=2",
    "segmentation.width=8",
    "segmentation.size_px=32",
    "segmentation.crop_px=32",
    "segmentation.pixel_mm=4",
    "evaluation.num_bootstrap=100",
    "device=cpu",
]


@pytest.fixture
def folder(tmp_path, write_cases):
    """Six simulated patients of two vendors."""
    write_cases(tmp_path / "cases", "GE", 6, seed=1)
    (tmp_path / "cases" / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    return tmp_path / "cases"


def without(case, phase, label):
    masks = case.masks.copy()
    masks[phase][masks[phase] == label] = 0
    return replace(case, masks=masks)


def test_each_task_has_a_section_a_format_and_settings_of_its_own():
    assert len({task.format for task in TASKS.values()}) == len(TASKS)
    assert TASKS["ejection_fraction"].num_steps(load("default")) == 600
    assert TASKS["segmentation"].num_steps(load("default")) == 3000


def test_the_model_s_file_knows_its_task(tiny, tmp_path, capsys):
    save_regressor(tmp_path / "model.safetensors", Regressor())
    assert task_of_model(tmp_path / "model.safetensors") is TASKS["ejection_fraction"]
    assert task_of_model(SHIPPED_SEGMENTER) is TASKS["segmentation"]
    assert main(["train", "--task", "motion", "--data", "x", "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "Expected --task in ('ejection_fraction', 'segmentation'), got 'motion'." in capsys.readouterr().err


@pytest.mark.parametrize("phase", [ED, ES])
@pytest.mark.parametrize("label", [RV, MYO, LV])
def test_what_nobody_drew_is_not_learnt_as_background(folder, phase, label):
    whole = load_cases(folder)[0]
    assert is_segmented(whole) and not is_segmented(without(whole, phase, label))
    alone = prepare_examples([whole], GRID)
    both = prepare_examples([whole, without(load_cases(folder)[1], phase, label)], GRID)
    assert torch.equal(alone.images, both.images) and torch.equal(alone.masks, both.masks)
    with pytest.raises(UserError, match="none of the 1 training cases has masks of both ventricles"):
        prepare_examples([without(whole, phase, label)], GRID)


def test_unknown_labels_are_refused_with_the_file_s_name(folder, tmp_path, capsys):
    path = next((folder / "cases").glob("*.npz"))
    arrays = dict(np.load(path))
    arrays["masks"][0, 0, 0, 0] = 4
    np.savez(path, **arrays)
    out = tmp_path / "m.safetensors"
    assert main(["train", "--task", "segmentation", "--data", str(folder), "--out", str(out), *SETTINGS]) == 2
    assert path.name in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_a_segmenter_is_trained_on_folders_and_tested_by_vendor(folder, tmp_path, write_cases, capsys):
    first = load_cases(folder)[0]
    save_case(folder, replace(first, masks=np.zeros_like(first.masks)))
    write_cases(tmp_path / "more", "Philips", 5, seed=7)
    out = tmp_path / "segmenter.safetensors"
    command = ["train", "--task", "segmentation", "--data", str(folder), str(tmp_path / "more"), "--out", str(out)]
    assert main([*command, *SETTINGS]) == 0
    printed = capsys.readouterr()
    assert "1 of 6 cases are without masks of both ventricles" in printed.err and "10 cases, 2 steps" in printed.err
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["trained_on"], card["vendors"]) == (10, {"GE": 5, "Philips": 5})
    num = sum(parameter.numel() for parameter in load_segmenter(out).parameters())
    assert card["parameters"] == num and 0 < card["elapsed_s"] < 600
    assert f"{num:,} parameters, trained in " in printed.err
    assert "weights may disclose the real patients" in card["data"] and card["settings"]["num_steps"] == 2
    assert first.info.pseudonym not in json.dumps(card)
    assert sorted(path.name for path in tmp_path.glob("segmenter*")) == ["segmenter.json", "segmenter.safetensors"]

    evaluate = ["evaluate", "--model", str(out), "--test", str(folder), "--csv", str(tmp_path / "s.csv")]
    assert main([*evaluate, "--json", *SETTINGS]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"segmentation"} and list(shown["segmentation"][str(folder)]) == ["GE", "all"]
    cases = [case for case in load_cases(folder) if is_segmented(case)]
    expected = score_masks(cases, predict_masks(load_segmenter(out), cases), ["GE"] * 5, 100, 0)
    assert shown["segmentation"][str(folder)] == json.loads(json.dumps(expected))
    assert (tmp_path / "s.csv").read_text() == as_csv(shown)
    with (tmp_path / "s.csv").open() as file:
        metrics = [row["metric"] for row in csv.DictReader(file) if row["group"] == "all"]
    assert {"dice_lv", "dice_mean", "hd95_mm_rv", "ef_mae_points"} <= set(metrics)
    assert main([*evaluate, *SETTINGS]) == 0
    assert "Dice LV" in capsys.readouterr().out


def test_the_public_segmenter_can_be_tested_and_real_patients_are_rounded_and_joined(folder, write_cases, capsys):
    (folder / "prepared.json").unlink()
    assert main(["evaluate", "--model", str(SHIPPED_SEGMENTER), "--test", str(folder), "--json", *SETTINGS]) == 0
    score = json.loads(capsys.readouterr().out)["segmentation"][str(folder)]["all"]
    numbers = [*score["dice"].values(), *score["ci95"]["dice"]["lv"]]
    assert all(number is None or number == round(number, 2) for number in numbers)
    assert score["dice"]["lv"] > 0.3, "crude discs, but found"
    for path in sorted((folder / "cases").iterdir())[:2]:
        case = next(case for case in load_cases(folder) if case.info.pseudonym == path.stem)
        save_case(folder, replace(case, masks=np.zeros_like(case.masks)))
    assert main(["evaluate", "--model", str(SHIPPED_SEGMENTER), "--test", str(folder), "--json", *SETTINGS]) == 2
    assert "fewer than 5 patients with masks of both ventricles" in capsys.readouterr().err


def test_figures_of_perfect_and_of_shifted_masks(folder):
    cases = load_cases(folder)
    perfect = [torch.from_numpy(case.masks) for case in cases]
    cases = [
        replace(case, info=replace(case.info, ef=ejection_fraction(found.numpy())))
        for case, found in zip(cases, perfect, strict=True)
    ]
    score = score_masks(cases, perfect, ["GE"] * 6, 100, 0)["all"]
    assert score["dice"] == dict.fromkeys(("lv", "myo", "rv", "mean"), 1.0)
    assert score["hd95_mm"] == dict.fromkeys(("lv", "myo", "rv"), 0.0) and score["ef_mae_points"] == 0
    shifted = [found.roll(3, dims=3) for found in perfect]
    score = score_masks(cases, shifted, ["GE"] * 6, 100, 0)["all"]
    assert 0 < score["dice"]["lv"] < 1 and score["hd95_mm"]["lv"] == pytest.approx(3 * cases[0].spacing_mm[2], abs=2)
    assert score["ef_mae_points"] == score["ef_bias_points"] == 0
    assert score["n_undefined"] == 0 and score["ci95"]["dice"]["lv"][0] <= score["dice"]["lv"]


def test_a_shift_along_the_stack_is_as_far_as_its_slices_are_apart():
    true = torch.zeros(1, 5, 16, 16, dtype=torch.uint8)
    true[:, 1:4, 4:12, 4:12] = LV
    found = true.roll(1, dims=1)
    _, distance = overlap_and_distance(found, true, (10.0, 2.0, 2.0))
    assert distance[0, 0] == 10 and distance[0, 1:].isnan().all()


def test_a_structure_that_was_not_found_leaves_its_distance_undefined_and_counts(folder):
    cases = load_cases(folder)
    found = [torch.from_numpy(case.masks.copy()) for case in cases]
    found[0][found[0] == LV] = 0
    scores = score_masks(cases, found, ["GE"] * 3 + ["Philips"] * 3, 100, 0)
    assert scores["all"]["n_undefined"] == scores["GE"]["n_undefined"] == 1 and scores["Philips"]["n_undefined"] == 0
    assert scores["GE"]["hd95_mm"]["lv"] is None and scores["GE"]["ef_mae_points"] is None
    assert scores["GE"]["dice"]["lv"] == pytest.approx(2 / 3) and scores["GE"]["hd95_mm"]["rv"] == 0
    assert scores["Philips"]["ef_mae_points"] is not None and json.dumps(scores, allow_nan=False)


def test_training_on_cases_resumes_and_its_seed_decides(folder, tmp_path, monkeypatch):
    from fedcmr.server.tasks.segmentation import training

    cases, config = load_cases(folder), SMALL
    whole = train_on_cases(cases, config, 0, CPU)
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    views = training.random_views

    def stop(examples, config, seed, step):
        if step == 2:
            raise KeyboardInterrupt
        return views(examples, config, seed, step)

    monkeypatch.setattr(training, "random_views", stop)
    with pytest.raises(KeyboardInterrupt):
        train_on_cases(cases, config, 0, CPU, tmp_path / "c.safetensors")
    monkeypatch.setattr(training, "random_views", views)
    resumed = train_on_cases(cases, config, 0, CPU, tmp_path / "c.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other = train_on_cases(cases, config, 1, CPU)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_the_tidy_csv_has_every_figure_of_a_segmentation():
    score = {
        "n_patients": 9,
        "n_undefined": 0,
        "dice": {"lv": 0.9},
        "hd95_mm": {"lv": None},
        "ef_mae_points": 3.0,
        "ci95": {"dice": {"lv": [0.8, 0.95]}, "hd95_mm": {"lv": None}, "ef_mae_points": [2.0, 4.0]},
    }
    privacy, part = {"sites": {}}, {"num_rounds": 0, "attendance": {}}
    timing = {"seconds_per_stage": {}, "seconds_per_round": [], "bytes_per_site_and_round": {}}
    report = {
        "regression": {},
        "baselines": {},
        "segmentation": {"ward": {"all": score}},
        "privacy": privacy,
        "provenance": part,
        "synthetic": {"n_cases": 0, "per_vendor": {}},
        "timing": timing,
    }
    rows = {row.metric: row for row in tidy_rows(report) if row.section == "segmentation"}
    assert (rows["dice_lv"].value, rows["dice_lv"].low, rows["dice_lv"].high) == (0.9, 0.8, 0.95)
    assert rows["hd95_mm_lv"].value is None and rows["ef_mae_points"].high == 4.0


def test_examples_and_scores_go_through_the_interface(folder, tiny):
    cases, config = load_cases(folder), Config()
    for task in TASKS.values():
        assert len(task.examples(cases, config).images) >= len(cases)
        assert all(task.is_labelled(case) and task.can_teach(case) for case in cases)
    assert math.isfinite(cases[0].info.ef)
