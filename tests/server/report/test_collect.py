"""What a run folder holds becomes the report's figures."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.experiments.models import predictions_folder
from fedcmr.server.report import collect as results
from fedcmr.server.report.collect import results_table, who_took_part, write_report
from fedcmr.server.settings import load
from fedcmr.shared import checkpoint
from fedcmr.shared.case import load_cases, write_index
from fedcmr.shared.provenance import PRIVATE_REAL, SIMULATED_SCANS, public
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, save_regressor

COLUMNS = ["pseudonym", "vendor", "ef", "ef_requested", "ef_measured", "lv_ed_ml", "lv_es_ml"]


@pytest.fixture
def run(make_study, write_cases):
    """A finished run whose synthetic cases and test patients are invented."""
    run = make_study("hospitals.source=phantom", "evaluation.num_bootstrap=100")
    write_cases(run.path / "synthetic", "Siemens", 6, seed=8)
    write_cases(run.path / "test" / "hospitals" / "a", "Siemens", 10, seed=9)
    site = {"epsilon": 7.5, "steps": 3, "refused": [], "accountant": "prv", "releases": []}
    checkpoint.save(
        run.path / "generator.safetensors",
        {"x": np.zeros(1, np.float32)},
        {"sites": {"a": site}, "delta": 1e-3, "run_id": "r", "private": True},
    )
    true = [case.info.ef for case in held_out(run)]
    predictions_folder(run).mkdir(parents=True)
    for model, error in (("without_b", 0.2), ("synthetic_only", 0.1)):
        predictions = {"vendors": ["Siemens"] * 10, "true": true, "predicted": [ef + error for ef in true]}
        (predictions_folder(run) / f"{model}.json").write_text(json.dumps({"hospitals": predictions}))
    return run


def held_out(run):
    return load_cases(run.path / "test" / "hospitals" / "a")


def write_labels(run, columns=COLUMNS, measured=lambda index, ef: f"{ef + 0.02:.6g}"):
    with (run.path / "synthetic" / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for index, case in enumerate(load_cases(run.path / "synthetic")):
            row = dict.fromkeys(COLUMNS, "1") | {"ef": case.info.ef, "ef_requested": case.info.ef}
            writer.writerow(row | {"ef_measured": measured(index, case.info.ef)})


def recorded(run, provenance):
    """Says of every site and test patient of the run where the scans come from."""
    study = json.loads((run.path / "study.json").read_text())
    for facts in study["sites"].values():
        facts["provenance"] = provenance.as_json()
    (run.path / "study.json").write_text(json.dumps(study))
    record = json.dumps({"provenance": provenance.as_json()})
    (run.path / "test" / "hospitals" / "a" / "prepared.json").write_text(record)


def report_of(run):
    write_report(run, [("hospitals", held_out(run))], run.stage_seconds())
    return json.loads((run.path / "report.json").read_text()), (run.path / "report.html").read_text()


def test_requested_mask_and_measured_ejection_fractions_are_distinguished(run):
    write_labels(run, measured=lambda index, ef: "" if index == 2 else f"{ef + 0.02:.6g}")
    synthetic = report_of(run)[0]["synthetic"]
    assert synthetic["measured_ef"][2] is None and len(synthetic["measured_ef"]) == 6
    assert synthetic["requested_ef"] == synthetic["mask_ef"]
    assert synthetic["agreement"]["n_patients"] == 5
    assert synthetic["agreement"]["mae_points"] == pytest.approx(2, abs=1e-3)
    assert synthetic["agreement"]["r"] == pytest.approx(1, abs=1e-4)


def test_a_release_older_than_the_measurement_says_so(run):
    write_labels(run, [name for name in COLUMNS if name != "ef_measured"])
    report, page = report_of(run)
    assert report["synthetic"]["measured_ef"] is report["synthetic"]["agreement"] is None
    assert "Nobody has measured" in page


def test_a_segmenter_that_finds_nothing_is_no_crash(run):
    write_labels(run, measured=lambda index, ef: "")
    report, page = report_of(run)
    assert report["synthetic"]["agreement"]["n_patients"] == 0
    assert "In none of the synthetic images" in page


def test_the_report_holds_the_main_models_figures_by_what_is_known_of_the_patients(run):
    write_labels(run)
    folder = run.path / "test" / "hospitals" / "a"
    infos = [
        replace(case.info, sex=sex, pathology="DCM") for case, sex in zip(held_out(run), "FFFFFMMMMM", strict=True)
    ]
    write_index(folder, infos)
    subgroups = report_of(run)[0]["subgroups"]["hospitals"]
    assert {fact: list(groups) for fact, groups in subgroups.items()} == {
        "field strength": ["1.5 T"],
        "pathology": ["DCM"],
        "sex": ["F", "M"],
    }
    assert subgroups["sex"]["F"]["n_patients"] == 5
    assert subgroups["sex"]["F"]["mae_points"] == pytest.approx(10), "the main model's, not that without b"


@pytest.mark.parametrize("change", [{"true": [0.5] * 10}, {"predicted": [0.5] * 9}])
def test_subgroups_are_left_out_where_the_predictions_are_not_those_of_the_patients(run, change):
    true = [case.info.ef for case in held_out(run)]
    predictions = {"vendors": ["Siemens"] * 10, "true": true, "predicted": [0.5] * 10}
    assert list(results._subgroups({"hospitals": predictions}, [("hospitals", held_out(run))], run.config)) == [
        "hospitals"
    ]
    sets = [("hospitals", held_out(run)), ("another", held_out(run))]
    assert results._subgroups({"hospitals": predictions | change}, sets, run.config) == {}


def test_real_patients_are_shown_only_where_they_are_simulated_or_it_was_allowed(run):
    write_labels(run)
    recorded(run, SIMULATED_SCANS)
    report, page = report_of(run)
    assert page.count("data:image/png") == 4 + 4 + 2, "four best, four worst, a real and a synthetic row"
    assert report["simulated"] and "Test patients of the simulated hospital" in page
    for provenance in (PRIVATE_REAL, public("ACDC")):
        recorded(run, provenance)
        report, page = report_of(run)
        assert page.count("data:image/png") == 1 and "Images of the test patients of hospitals are left out" in page
        assert not report["simulated"] and report["provenance"]["test_sets"]["hospitals"] == {
            **provenance.as_json(),
            "too_few": False,
        }
        assert provenance.terms in page
    run.config.evaluation.show_real_images = True
    page = report_of(run)[1]
    assert page.count("data:image/png") == 10 and "Real test patients" in page


@pytest.mark.slow
def test_saliency_is_reported_for_synthetic_and_test_patients(run):
    write_labels(run)
    recorded(run, SIMULATED_SCANS)
    report, page = report_of(run)
    assert report["saliency"] == {} and "Saliency: what the predictions rest on" not in page, "there is no regressor"
    save_regressor(run.path / "regressor.safetensors", Regressor())
    report, page = report_of(run)
    figures = {name: scores["Siemens"] for name, scores in report["saliency"].items()}
    assert {name: row["n_patients"] for name, row in figures.items()} == {"synthetic": 6, "hospitals": 10}
    assert all(0 < row["ci95"][0] <= row["share_in_heart"] <= row["ci95"][1] < 1 for row in figures.values())
    # A disc of 30 mm and the visible four fifths of one of 18 mm next to it, in a field of 128 mm.
    expected = np.pi * (30**2 + 0.8 * 18**2) / 128**2
    assert figures["synthetic"]["area_share"] == pytest.approx(expected, rel=0.1)
    assert "Saliency: what the predictions rest on" in page and page.count("the heart outlined") == 2


@pytest.mark.slow
def test_real_patients_maps_are_shown_only_where_it_was_allowed(run):
    write_labels(run)
    save_regressor(run.path / "regressor.safetensors", Regressor())
    report, page = report_of(run)
    assert report["saliency"]["hospitals"]["all"]["n_patients"] == 10 and page.count("the heart outlined") == 1
    assert page.count("data:image/png") == 1 + 1


@pytest.mark.slow
def test_a_deployed_study_says_nothing_that_is_true_of_simulated_patients_only(run):
    """Its settings are the default ones, whose hospitals would be simulated: they decide nothing, and are not shown."""
    shutil.rmtree(run.path / "sites")  # these are elsewhere
    write_labels(run)
    save_regressor(run.path / "regressor.safetensors", Regressor())
    report, page = report_of(run)
    assert run.config.hospitals.source == "phantom" and report["simulated"] is False
    assert "10 real Siemens patients" in page and page.count("data:image/png") == 1 + 1, "synthetic ones only"
    assert "phantom" not in page and "phantom" not in report["settings"]
    sentences = re.split("[.<>]", page)
    assert [text for text in sentences if "simulated" in text and "segmenter" not in text] == []
    assert "Best cases" not in page and "Worst cases" not in page
    assert "Scatter plot of predicted against true" not in page, "no mark stands for one private patient"


def test_one_site_that_is_not_simulated_makes_the_study_not_simulated(run):
    write_labels(run)
    recorded(run, SIMULATED_SCANS)
    study = json.loads((run.path / "study.json").read_text())
    del study["sites"]["b"]["provenance"]
    (run.path / "study.json").write_text(json.dumps(study))
    report, page = report_of(run)
    assert report["simulated"] is False and report["provenance"]["sites"]["b"]["kind"] == "private"
    assert "patients were simulated too" not in page and "by the test patients of hospitals: these were" in page


def test_who_took_part_stands_at_the_top_of_the_page_and_in_the_json(run):
    write_labels(run)
    line = {"stage": "federation", "answered": ["a"], "refused": {"b": "budget-exhausted"}, "dropped": {}, "missing": 0}
    for server_round in (1, 2, 3):
        run.metric({**line, "round": server_round, "silent": 1, "elapsed_s": 1, "bytes_up": 1, "bytes_down": 1})
    report, page = report_of(run)
    part = report["provenance"]
    assert part["took_part"] == ["a"] and part["did_not_take_part"] == ["b", "c"]
    assert part["refused"] == {"b": ["budget-exhausted"]} and part["attendance"]["c"]["silent"] == 3
    header = page[: page.index("</header>")]
    assert "1 of 3 registered sites took part in 3 rounds: a." in header
    assert "b did not take part: refused 3 rounds (budget-exhausted)." in header
    assert "c did not take part: silent in 3 rounds." in header
    assert who_took_part(run)[0].startswith("1 of 3 registered sites")


def test_nothing_that_names_a_patient_is_in_the_report(run):
    write_labels(run)
    report_of(run)
    for name in ("report.json", "report.html"):
        text = (run.path / name).read_text()
        assert not any(
            f'"{case.info.pseudonym}"' in text or f">{case.info.pseudonym}" in text for case in held_out(run)
        )


def test_images_are_left_out_where_the_predictions_are_not_those_of_the_patients(run, write_cases):
    write_labels(run)
    write_cases(run.path / "test" / "hospitals" / "a", "Siemens", 10, seed=10)
    assert "Best cases" not in report_of(run)[1]


def test_the_predicted_sd_stands_on_the_marks_where_there_is_one(run):
    write_labels(run)
    recorded(run, SIMULATED_SCANS)
    assert "one predicted SD" not in report_of(run)[1]
    path = predictions_folder(run) / "synthetic_only.json"
    predictions = json.loads(path.read_text())
    predictions["hospitals"]["sd"] = [0.05, None, *[0.03] * 8]
    path.write_text(json.dumps(predictions))
    assert "one predicted SD" in report_of(run)[1]


def test_the_terminals_table_has_the_plain_names(run):
    write_labels(run)
    report_of(run)
    first_column = list(results_table(run).columns[0].cells)
    assert [name for name in first_column if name] == ["synthetic hearts only", "without site b"]


def test_the_settings_default_hides_real_patients():
    assert load("default").evaluation.show_real_images is False
