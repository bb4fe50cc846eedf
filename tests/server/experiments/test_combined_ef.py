"""The ejection fraction by two networks, against figures worked out by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedcmr.server.evaluation.disclosure import joined, overlap_discloses_few
from fedcmr.server.experiments import combined_ef
from fedcmr.server.experiments.combined_ef import best_weight, calibration, choose_weight, combined_scores, read_weight
from fedcmr.server.experiments.models import save_predictions
from fedcmr.server.report.build import ReportInputs, build_report
from fedcmr.server.report.collect import _combined_ef
from fedcmr.server.report.tidy_csv import tidy_rows
from fedcmr.server.settings import Config
from fedcmr.server.tasks.registry import TASKS
from fedcmr.shared.case import LV, load_cases, save_case, write_index
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS
from tests.conftest import make_case
from tests.server.report.report_study import study

WAYS = ("resnet50", "segmentation", "both")


def test_the_weight_is_that_of_the_least_squares():
    """d = (0.1, -0.2), e = (0.04, -0.03): (0.004 + 0.006) / 0.05 = 0.2."""
    network = np.array([0.5, 0.6])
    true, masks = network + np.array([0.04, -0.03]), network + np.array([0.1, -0.2])
    assert best_weight(true, network, masks) == 0.2
    facts = calibration(true, network, masks)
    assert facts["n_cases"] == 2 and facts["mae_points"] == pytest.approx(
        {"resnet50": 3.5, "segmentation": (6 + 17) / 2, "both": (2 + 1) / 2}
    )


def test_the_weight_says_where_one_of_them_does_not_help():
    true = [0.3, 0.5, 0.7]
    assert calibration(true, true, [0.2, 0.5, 0.9])["weight"] == 0
    assert calibration(true, [0.2, 0.5, 0.9], true)["weight"] == 1
    assert calibration(true, [0.31, 0.5, 0.7], [0.4, 0.5, 0.7])["weight"] == 0, "beyond it, on the same side"
    assert calibration(true, [0.4] * 3, [0.4] * 3)["weight"] == 0, "no difference"


def test_hearts_without_a_cavity_found_are_left_out():
    facts = calibration([0.3, 0.5, 0.7], [0.2, 0.5, 0.7], [0.3, np.nan, np.nan])
    assert (facts["weight"], facts["n_cases"]) == (1, 1)
    nothing = calibration([0.3], [0.2], [np.nan])
    assert nothing == {"weight": 0, "n_cases": 0, "mae_points": dict.fromkeys(WAYS)}


def patients(num=5, vendor="GE", prefix="p"):
    cases = [make_case(f"{prefix}{i}", vendor, seed=i) for i in range(num)]
    return [replace(case, info=replace(case.info, ef=0.5)) for case in cases]


def rows(cases, errors):
    """Both tasks' predictions: the ResNet50 is off by the first number, the segmentation by the second, in points."""
    vendors = joined([case.info.vendor for case in cases])
    predicted, found = ([case.info.ef + e / 100 for case, e in zip(cases, column, strict=True)] for column in errors)
    main = {"vendors": vendors, "true": [case.info.ef for case in cases], "predicted": predicted}
    return main, {"vendors": vendors, "num_phases/ef": [1] * len(cases), "ef_found": found}


ERRORS = ([10, -2, 4, 4, 4], [-2, 2, 0, 4, -4])


def test_the_figures_of_the_three_ways():
    """With a weight of 0.25 both are off by (7, -1, 3, 4, 2) points."""
    cases, config = patients(), Config()
    scores, differences = combined_scores(0.25, cases, rows(cases, ERRORS)[0], cases, rows(cases, ERRORS)[1], config, 1)
    found = {way: (scores[way]["all"]["mae_points"], scores[way]["all"]["bias_points"]) for way in WAYS}
    assert found["resnet50"] == pytest.approx((4.8, 4.0))
    assert found["segmentation"] == pytest.approx((2.4, 0.0))
    assert found["both"] == pytest.approx((3.4, 3.0))
    assert {way: row["all"]["difference_points"] for way, row in differences.items()} == pytest.approx(
        {"segmentation": -2.4, "both": -1.4}
    )
    low, high = differences["both"]["all"]["ci95"]
    assert -3 <= low < -1.4 < high <= 0, "the five differences are -3, -1, -1, 0 and -2"
    assert list(scores["both"]) == ["GE", "all"] and scores["both"]["GE"]["n_patients"] == 5


def test_without_a_cavity_both_are_the_resnet50():
    cases = patients()
    main, masks = rows(cases, ERRORS)
    masks["ef_found"][0] = float("nan")
    scores, differences = combined_scores(0.25, cases, main, cases, masks, Config(), True)
    assert scores["segmentation"]["all"]["mae_points"] is None and scores["segmentation"]["all"]["n_undefined"] == 1
    assert scores["both"]["all"]["mae_points"] == pytest.approx((10 + 1 + 3 + 4 + 2) / 5)
    assert differences["segmentation"]["all"]["difference_points"] is None


@pytest.mark.parametrize(("without", "shown"), [(0, True), (2, False), (5, True)])
def test_few_patients_without_a_segmentation_do_not_follow_by_subtraction(without, shown):
    """Ten of a vendor have masks; so many more have only an ejection fraction, and are in the ResNet50's own table."""
    cases = patients(10)
    more = [replace(case, masks=np.zeros_like(case.masks)) for case in patients(without, prefix="m")]
    errors = [4.0] * (10 + without)
    main, masks = rows([*cases, *more], (errors, errors))[0], rows(cases, (errors[:10], errors[:10]))[1]
    found = combined_scores(0.5, [*cases, *more], main, cases, masks, Config(), True)
    assert (found is not None) == shown
    simulated = combined_scores(0.5, [*cases, *more], main, cases, masks, Config(), False)
    assert simulated[0]["both"]["all"]["n_patients"] == 10


def test_a_cross_table_without_small_cells_discloses_nobody():
    assert not overlap_discloses_few([("GE", "GE")] * 5 + [("GE", "")] * 5)
    assert overlap_discloses_few([("GE", "GE")] * 9 + [("GE", "others")] * 4)


def test_predictions_of_other_patients_or_of_earlier_versions_are_left_out():
    cases, config = patients(), Config()
    main, masks = rows(cases, ERRORS)
    assert combined_scores(0.5, cases, main, cases[1:], masks, config, False) is None
    assert combined_scores(0.5, cases, {**main, "true": [0.4] * 5}, cases, masks, config, False) is None
    del masks["ef_found"]
    assert combined_scores(0.5, cases, main, cases, masks, config, False) is None


def test_the_patients_of_both_tasks_are_matched_whoever_is_missing_in_one():
    """The first has no masks, the last no ejection fraction: three are left, each with its own predictions."""
    cases = patients()
    main_cases = [replace(cases[0], masks=np.zeros_like(cases[0].masks)), *cases[1:4]]
    masked = [*cases[1:4], replace(cases[4], info=replace(cases[4].info, ef=float("nan")))]
    main = rows(main_cases, ([9, 1, 2, 3], [0] * 4))[0]
    masks = rows([*cases[1:4], cases[4]], ([0] * 4, [-1, -2, -3, 9]))[1]
    scores, _ = combined_scores(0.5, main_cases, main, masked, masks, Config(), False)
    assert scores["resnet50"]["all"]["bias_points"] == pytest.approx(2)
    assert scores["segmentation"]["all"]["bias_points"] == pytest.approx(-2)
    assert scores["both"]["all"]["mae_points"] == pytest.approx(0)


@pytest.fixture
def run(make_study):
    """Two vendors' six test patients each, predicted by both tasks, and weight 0.25."""
    run = make_study("tasks=[ejection_fraction,segmentation]", "evaluation.num_bootstrap=100")
    folder = run.path / "test" / "hospitals"
    for vendor in ("GE", "Philips"):
        cases = patients(6, vendor)
        for case in cases:
            save_case(folder / vendor, case)
        write_index(folder / vendor, [case.info for case in cases])
    cases = [case for vendor in ("GE", "Philips") for case in load_cases(folder / vendor)]
    main, masks = rows(cases, ([4.04] * 6 + [-6] * 6, [-4] * 6 + [2] * 6))
    masks |= {f"{part}/{name}": [0.5] * 12 for part in ("dice", "hd95_mm") for name in ("lv", "myo", "rv")}
    masks |= {"dice/mean": [0.5] * 12, "ef_mae_points": [1.0] * 12, "ef_bias_points": [1.0] * 12}
    save_predictions(run, "synthetic_only", [("hospitals", cases)], {"hospitals": main})
    save_predictions(run, "segmentation/synthetic_only", [("hospitals", cases)], {"hospitals": masks})
    (run.path / "checkpoints").mkdir(exist_ok=True)
    facts = {"weight": 0.25, "n_cases": 48, "mae_points": dict(zip(WAYS, (3.0, 2.5, 2.25), strict=True))}
    (run.path / "checkpoints" / "combined_ef.json").write_text(json.dumps(facts))
    return run, cases, main, masks


@pytest.mark.slow
@pytest.mark.parametrize("provenance", [SIMULATED_SCANS, PRIVATE_REAL])
def test_the_report_has_them_by_vendor_beside_the_resnet50(run, tmp_path, provenance):
    run, cases, main, masks = run
    part = _combined_ef(
        run,
        [("hospitals", cases)],
        {"hospitals": main},
        {"segmentation": {"synthetic_only": {"hospitals": masks}}},
        lambda task, by_set: by_set,
        {"hospitals": provenance},
    )
    assert part["weight"] == 0.25 and part["left_out"] == []
    of_both = part["test_sets"]["hospitals"]["both"]
    assert of_both["GE"]["mae_points"] == pytest.approx(3 / 4 * 4.04 - 1)
    assert of_both["Philips"]["bias_points"] == pytest.approx(-6 * 3 / 4 + 2 / 4)
    difference = part["differences"]["hospitals"]["both"]["all"]["difference_points"]
    assert difference == pytest.approx((2.03 + 4.0) / 2 - (4.04 + 6) / 2)
    report, inputs = study()
    build_report({**report, "combined_ef": part}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<h2 id="combined-ef">') :]
    section = section[: section.index("</section>")]
    assert (
        " There the mean" in " ".join(section.split())
        and "weight, 0.25, was chosen on 48 synthetic hearts" in section
        and "2.2 by both" in section
    )
    assert section.count("both together</th>") == section.count("segmentation</th>") == 3
    assert "<td>+0.0" not in section and "\u22122.0<small>" in section
    sections = {(row.section, row.model) for row in tidy_rows(json.loads((tmp_path / "report.json").read_text()))}
    assert ("ejection fraction by stack", "both") in sections
    assert ("ejection fraction by stack minus resnet50", "segmentation") in sections


def test_a_weight_of_nothing_is_said_in_words(run, tmp_path):
    run, cases, main, masks = run
    by_set = ({"hospitals": main}, {"segmentation": {"synthetic_only": {"hospitals": masks}}})
    facts = {"weight": 0.0, "n_cases": 48, "mae_points": dict(zip(WAYS, (3.0, 9.0, 3.0), strict=True))}
    (run.path / "checkpoints" / "combined_ef.json").write_text(json.dumps(facts))
    options = (lambda task, rows: rows, {"hospitals": SIMULATED_SCANS})
    part = _combined_ef(run, [("hospitals", cases)], *by_set, *options)
    assert part["test_sets"]["hospitals"]["both"] == part["test_sets"]["hospitals"]["resnet50"]
    report, _ = study()
    build_report({**report, "combined_ef": part}, ReportInputs(), tmp_path)
    assert "the segmentation does not help: its weight is" in (tmp_path / "report.html").read_text()
    (run.path / "checkpoints" / "combined_ef.json").unlink()
    assert _combined_ef(run, [("hospitals", cases)], *by_set, *options) is None, "a study of an earlier version"


def test_the_weight_is_chosen_on_the_hearts_given_and_kept(make_study, monkeypatch):
    """A network that says 0.6 for all, and a segmentation that finds the masks as they are."""
    run = make_study("tasks=[ejection_fraction,segmentation]")
    cases = patients(4)
    exact = [torch.from_numpy(case.masks) for case in cases]
    efs = [1 - (m[1] == LV).sum() / (m[0] == LV).sum() for m in exact]
    cases = [replace(case, info=replace(case.info, ef=float(ef))) for case, ef in zip(cases, efs, strict=True)]
    seen = {"ejection_fraction": SimpleNamespace(ef=np.full(4, 0.6)), "segmentation": exact}
    for name, task in TASKS.items():
        monkeypatch.setattr(type(task), "load", lambda self, path: None)
        monkeypatch.setattr(type(task), "predict", lambda self, *arguments, found=seen[name]: found)
    choose_weight(run, cases)
    facts = read_weight(run)
    assert facts["weight"] == 1 and facts["n_cases"] == 4
    assert facts["mae_points"]["resnet50"] == pytest.approx(100 * np.abs(0.6 - np.array(efs)).mean())
    assert combined_ef.SEED_OFFSET, "other hearts than those of the study's seed"
