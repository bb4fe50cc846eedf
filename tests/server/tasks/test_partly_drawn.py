"""Patients whose masks are drawn in part test a segmenter for what is drawn; no figure is of a few of them."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from fedcmr.client.ingest.drawn import with_not_drawn
from fedcmr.server.cli import main
from fedcmr.server.experiments.models import read_predictions, save_predictions
from fedcmr.server.experiments.models import test_sets as held_out_sets
from fedcmr.server.report.collect import _disclosable, _other_tasks
from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import TASKS
from fedcmr.server.tasks.segmentation.scores import disclosable, overlap_and_distance, per_patient, score_masks
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, Case, CaseInfo, load_cases, save_case, write_index
from fedcmr.shared.tasks.segmentation.segmenter import SHIPPED_SEGMENTER

SPACING_MM = np.array([10, 2, 2], np.float32)


def whole(name="p", vendor="GE", es_rows=4, contours="drawn") -> Case:
    """Four slices of squares, the cavity with 8 rows at ED and fewer at ES, one slice without a heart."""
    masks = np.zeros((2, 5, 32, 32), np.uint8)
    masks[:, 1:, 4:20, 4:16] = MYO
    masks[:, 1:, 4:20, 18:26] = RV
    masks[ED, 1:, 6:14, 6:14] = LV
    masks[ES, 1:, 6 : 6 + es_rows, 6:14] = LV
    ef = float("nan") if contours == "auto" else 1 - es_rows / 8
    info = CaseInfo(name, vendor, 1.5, ef, name, contours=contours)
    return Case(info, np.full(masks.shape, 0.5, np.float32), masks, SPACING_MM)


def drawn_in_part(case: Case, *missing: tuple[int, int]) -> Case:
    """The case without structures (phase, label) that nobody drew, as `fedcmr-client prepare` leaves it."""
    masks = case.masks.copy()
    for phase, label in missing:
        masks[phase][masks[phase] == label] = 0
    return replace(case, masks=with_not_drawn(masks), info=replace(case.info, contours="partial"))


def like_sunnybrook(name="p", vendor="GE") -> Case:
    """Cavity in both phases, muscle at ED only, no right ventricle."""
    return drawn_in_part(whole(name, vendor), (ED, RV), (ES, RV), (ES, MYO))


def labels_of(case: Case) -> torch.Tensor:
    return torch.from_numpy(case.masks.copy())


def test_each_structure_is_judged_in_the_phases_where_it_is_drawn():
    """Found: the cavity one row short at ED, the muscle right at ED and nowhere at ES."""
    found = labels_of(whole())
    found[ED, :, 6][found[ED, :, 6] == LV] = MYO
    found[ES][found[ES] == MYO] = 0
    values = {name: column[0] for name, column in per_patient([like_sunnybrook()], [found]).items()}
    lv_at_ed = 2 * 7 / (7 + 8)
    assert values["dice/lv"] == pytest.approx((lv_at_ed + 1) / 2)
    muscle = 16 * 12 - 64
    assert values["dice/myo"] == pytest.approx(2 * muscle / (muscle + muscle + 8)), "of ED alone"
    assert np.isnan(values["dice/mean"]) and np.isnan(values["hd95_mm/rv"])
    assert [values[f"num_phases/{name}"] for name in ("lv", "myo", "rv", "mean", "ef")] == [2, 1, 0, 0, 1]
    assert values["ef_bias_points"] == pytest.approx(100 * ((1 - 4 / 7) - 0.5))


def test_what_is_found_where_nobody_drew_does_not_count():
    """A right ventricle that nobody drew, and a cavity in a slice where one may have been passed over."""
    case = like_sunnybrook()
    found = labels_of(whole())
    found[:, 0] = found[:, 1]
    overlap, distance = overlap_and_distance(found, torch.from_numpy(case.masks), (10.0, 2.0, 2.0))
    assert overlap[:, 0].tolist() == [1, 1] and distance[:, 0].tolist() == [0, 0]
    assert overlap[:, 1].tolist()[ED] == 1
    in_whole, _ = overlap_and_distance(found, torch.from_numpy(whole().masks), (10.0, 2.0, 2.0))
    assert in_whole[ED, 0] == pytest.approx(2 * 4 / (4 + 5)), "where all is drawn, the slice is background"
    unknown = whole()
    unknown.masks[:, 0] = NOT_DRAWN
    assert overlap_and_distance(found, torch.from_numpy(unknown.masks), (10.0, 2.0, 2.0))[0][ED, 0] == 1


def test_figures_cover_the_patients_who_have_a_structure_and_say_how_many():
    cases = [whole(f"w{i}") for i in range(6)] + [like_sunnybrook(f"s{i}") for i in range(5)]
    found = [labels_of(whole()) for _ in cases]
    found[0][found[0] == RV] = 0  # a patient who has one
    found[6][found[6] == RV] = 0  # a patient who has none
    score = score_masks(cases, found, ["GE"] * 11, 100, 0)["all"]
    assert score["n_patients"] == 11 and score["n_drawn"] == {"lv": 11, "myo": 11, "rv": 6, "mean": 6, "ef": 11}
    assert score["dice"] == {"lv": 1, "myo": 1, "rv": pytest.approx(5 / 6), "mean": pytest.approx((5 + 2 / 3) / 6)}
    assert score["n_undefined"] == 1 and score["hd95_mm"] == {"lv": 0, "myo": 0, "rv": None}
    assert score["ef_mae_points"] == pytest.approx(0)


def test_no_ejection_fraction_where_the_cavity_is_drawn_at_one_phase():
    cases = [drawn_in_part(whole(f"e{i}"), (ES, LV), (ES, MYO), (ES, RV)) for i in range(5)]
    score = score_masks(cases, [labels_of(whole())] * 5, ["GE"] * 5, 100, 0)["all"]
    assert score["n_drawn"] == {"lv": 5, "myo": 5, "rv": 5, "mean": 5, "ef": None}
    assert score["ef_mae_points"] is None and score["n_undefined"] == 0 and score["dice"]["mean"] == 1


def test_a_structure_of_a_few_patients_is_left_out_of_its_vendor_and_of_all():
    """Philips' three right ventricles would follow from all of them and GE's; so all is GE's."""
    cases = [whole(f"g{i}", "GE") for i in range(8)]
    cases += [whole(f"p{i}", "Philips") for i in range(3)] + [like_sunnybrook(f"q{i}", "Philips") for i in range(6)]
    groups = [case.info.vendor for case in cases]
    scores = score_masks(cases, [labels_of(whole())] * 17, groups, 100, 0)
    assert {name: score["n_drawn"]["rv"] for name, score in scores.items()} == {"GE": 8, "Philips": None, "all": 8}
    assert scores["Philips"]["dice"]["rv"] is scores["Philips"]["hd95_mm"]["rv"] is None
    assert scores["Philips"]["dice"]["lv"] == 1 and scores["all"]["n_drawn"]["lv"] == 17


def test_the_mean_gives_no_few_patients_away():
    """Two of twenty lack the right ventricle: of them the other structures would follow from the mean."""
    cases = [whole(f"w{i}") for i in range(18)] + [like_sunnybrook(f"s{i}") for i in range(2)]
    score = score_masks(cases, [labels_of(whole())] * 20, ["GE"] * 20, 50, 0)["all"]
    assert score["n_drawn"] == {"lv": 20, "myo": 20, "rv": 18, "mean": None, "ef": 20}
    assert score["dice"]["mean"] is None and score["dice"]["rv"] == 1


def test_whatever_is_drawn_no_figure_and_no_difference_of_figures_is_of_a_few():
    rng = np.random.default_rng(0)
    structures = ("lv", "myo", "rv")
    for _ in range(200):
        groups = np.repeat(["GE", "Philips", "Siemens"], rng.integers(5, 14, 3))
        drawn = {name: (rng.random(len(groups)) < rng.choice([0.2, 0.8, 0.95, 1])).astype(float) for name in structures}
        drawn["mean"] = np.all([drawn[name] for name in structures], axis=0).astype(float)
        drawn["ef"] = drawn["lv"]
        kept = disclosable({f"num_phases/{name}": values for name, values in drawn.items()}, groups)
        kept = {name: kept[f"num_phases/{name}"] > 0 for name in drawn}
        sets = [groups == name for name in np.unique(groups)]
        for size in (1, 2, 3):
            for chosen in combinations(sets, size):
                here = np.any(chosen, axis=0)
                for values in kept.values():
                    assert (here & values).sum() == 0 or (here & values).sum() >= 5
                if (here & kept["mean"]).any():
                    rest = here & ~kept["mean"] & (kept["lv"] | kept["myo"] | kept["rv"])
                    assert rest.sum() == 0 or rest.sum() >= 5


def test_predictions_of_earlier_versions_are_of_complete_masks():
    values = per_patient([whole()] * 5, [labels_of(whole())] * 5)
    old = {name: column for name, column in values.items() if not name.startswith(("num_phases", "ef_found"))}
    task, config = TASKS["segmentation"], None
    kept = task.disclosable(old, ["GE"] * 5)
    assert kept["num_phases/rv"] == [2] * 5 and json.dumps(kept)

    config = Config()
    config.evaluation.num_bootstrap = 100
    assert task.table(old, ["GE"] * 5, config) == task.table(values, ["GE"] * 5, config)


@pytest.fixture
def ward(tmp_path):
    """Seven patients like Sunnybrook's, and one whose contours a program found."""
    cases = [like_sunnybrook(f"s{i}") for i in range(7)] + [whole("auto", contours="auto")]
    for case in cases:
        save_case(tmp_path / "ward", case)
    write_index(tmp_path / "ward", [case.info for case in cases])
    return tmp_path / "ward"


def test_a_folder_of_partial_masks_is_tested_for_what_is_drawn(ward, capsys):
    command = [
        "evaluate",
        "--model",
        str(SHIPPED_SEGMENTER),
        "--test",
        str(ward),
        "--set",
        "evaluation.num_bootstrap=100",
    ]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    score = json.loads(printed.out)["segmentation"][str(ward)]["all"]
    assert score["n_patients"] == 7 and score["n_drawn"] == {"lv": 7, "myo": 7, "rv": None, "mean": None, "ef": 7}
    assert score["dice"]["lv"] is not None and score["dice"]["rv"] is None and score["dice"]["mean"] is None
    assert "1 of 8 cases are without" in printed.err
    assert main(command) == 0


def test_what_a_program_found_is_no_truth(ward, make_study):
    run = make_study("tasks=[ejection_fraction,segmentation]")
    (run.path / "test").mkdir()
    ward.rename(run.path / "test" / "ward")
    for name in TASKS:
        ((_, cases),) = held_out_sets(run, name)
        assert {case.info.contours for case in cases} == {"partial"} and len(cases) == 7
    auto = next(case for case in load_cases(run.path / "test" / "ward") if case.info.contours == "auto")
    assert not any(task.can_teach(auto) or task.is_labelled(auto) for task in TASKS.values())
    by_a_reader = replace(auto, info=replace(auto.info, ef=0.61))
    assert TASKS["ejection_fraction"].is_labelled(by_a_reader), "from a table"


def test_figures_of_pooled_test_sets_leave_the_same_patients_out(make_study):
    """Three right ventricles of one set would follow from the pooled figure and the other set's."""
    run = make_study("tasks=[ejection_fraction,segmentation]", "evaluation.num_bootstrap=100")
    sets = {
        "a": [whole(f"a{i}") for i in range(9)],
        "b": [whole(f"b{i}") for i in range(3)] + [like_sunnybrook(f"c{i}") for i in range(6)],
    }
    values = {
        name: {key: column.tolist() for key, column in per_patient(cases, [labels_of(whole())] * 9).items()}
        for name, cases in sets.items()
    }
    for model in ("synthetic_only", "matrix/synthetic/GE"):
        save_predictions(run, f"segmentation/{model}", list(sets.items()), values)
    parts = _other_tasks(run, {"segmentation": read_predictions(run, "segmentation")}, lambda task, by_set: {
        name: _disclosable(task, rows) for name, rows in by_set.items()
    })  # fmt: skip
    assert {name: score["GE"]["n_drawn"]["rv"] for name, score in parts["segmentation"].items()} == {"a": 9, "b": None}
    pooled = parts["tasks"]["segmentation"]["matrix"]["synthetic"]["GE"]["all"]
    assert (pooled["n_patients"], pooled["n_drawn"]["rv"], pooled["n_drawn"]["lv"]) == (18, 9, 18)
