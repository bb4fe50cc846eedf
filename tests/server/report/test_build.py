import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedcmr.server.dataset.making import DRAWN, Making
from fedcmr.server.evaluation.score import score
from fedcmr.server.evaluation.tables import table
from fedcmr.server.experiments.names import model_name, model_rank
from fedcmr.server.report.build import ReportInputs, as_json, build_report, groups_of
from tests.server.report.report_study import VENDORS, study


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    build_report(*study(), folder)
    return folder


def test_json_reads_back_and_holds_no_nan(folder):
    report, _ = study()
    assert json.loads((folder / "report.json").read_text()) == report
    odd = {"a": float("nan"), "b": [np.float32(0.5), float("inf")], "c": np.arange(2), "d": (1, None, "x")}
    assert as_json(odd) == {"a": None, "b": [0.5, None], "c": [0, 1], "d": [1, None, "x"]}
    assert sorted(path.name for path in folder.iterdir()) == ["report.csv", "report.html", "report.json"]


def test_page_is_one_file_without_network_or_script(folder):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\(", page)


def test_every_image_has_a_text_in_its_place(folder):
    images = re.findall(r"<img [^>]*>", (folder / "report.html").read_text())
    assert len(images) == 1 + 2 * 3 + 6 + 6 + 6 + 1 + 1
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in images)


def test_names_from_outside_are_escaped(folder):
    page = (folder / "report.html").read_text()
    assert "runs/default &lt;1&gt;" in page and "<1>" not in page


def test_report_shows_figures_of_the_json(folder):
    report, _ = study()
    page = (folder / "report.html").read_text()
    overall = report["regression"]["hospitals"]["all"]
    assert f"by {overall['mae_points']:.1f} points on average" in page
    for vendor in VENDORS:
        assert f"{report['regression']['hospitals'][vendor]['mae_points']:.1f}" in page
    assert "7.94" in page and "undefined" in page


def test_the_page_takes_its_sections_from_the_tasks(folder, tmp_path):
    assert 'id="segmentation"' not in (folder / "report.html").read_text()
    report, inputs = study()
    score = {
        "n_patients": 9,
        "n_undefined": 1,
        "dice": {"lv": 0.912, "myo": 0.8, "rv": 0.7, "mean": 0.8},
        "hd95_mm": {"lv": None, "myo": 4.04, "rv": 6.0},
        "ef_mae_points": 3.3,
        "ef_bias_points": -1.2,
        "ci95": {
            "dice": {"lv": [0.88, 0.94], "myo": None, "rv": None, "mean": None},
            "hd95_mm": dict.fromkeys(("lv", "myo", "rv")),
            "ef_mae_points": [2.1, 4.6],
            "ef_bias_points": None,
        },
    }
    build_report({**report, "segmentation": {"hospitals": {"GE": score, "all": score}}}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section aria-labelledby="segmentation">') :]
    section = section[: section.index("</section>")]
    assert "<td>0.91<small>0.88 to 0.94</small></td>" in section and "<td>undefined</td>" in section
    assert "3.3<small>2.1 to 4.6" in section and "all vendors" in section
    order = [page.index(f'<h2 id="{name}">') for name in ("vendors", "segmentation", "privacy")]
    assert order == sorted(order)


def test_the_section_says_on_how_many_patients_a_structure_is_drawn(tmp_path):
    report, inputs = study()
    parts = ("lv", "myo", "rv")
    score = {
        "n_patients": 9,
        "n_undefined": 0,
        "n_drawn": {"lv": 9, "myo": 7, "rv": None, "mean": None, "ef": 9},
        "dice": {"lv": 0.912, "myo": 0.81, "rv": None, "mean": None},
        "hd95_mm": {"lv": 3.0, "myo": 4.04, "rv": None},
        "ef_mae_points": 3.3,
        "ef_bias_points": -1.2,
        "ci95": {
            "dice": dict.fromkeys((*parts, "mean")),
            "hd95_mm": dict.fromkeys(parts),
            "ef_mae_points": None,
            "ef_bias_points": None,
        },
    }
    build_report({**report, "segmentation": {"hospitals": {"GE": score, "all": score}}}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section aria-labelledby="segmentation">') :]
    section = section[: section.index("</section>")]
    assert "<td>0.91</td>" in section and "<td>0.81<small>n = 7</small></td>" in section
    assert section.count("<td>–</td>") == 2 * 3 and "undefined<" not in section
    assert "at ED alone where nobody" in section


def test_real_images_appear_only_when_they_may(tmp_path):
    report, inputs = study(simulated=False)
    build_report(report, ReportInputs(**{**inputs.__dict__, "shown": []}), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("data:image/png", page)) == 3 + 3
    assert page.count("Images of the test patients of hospitals are left out") == 2
    assert "45 real patients" in page


def test_best_and_worst_cases_stand_with_both_ejection_fractions(folder):
    page = (folder / "report.html").read_text()
    captions = re.findall(r"<figcaption>(\w+)<br>true (\d+)\u00a0%, predicted (\d+)\u00a0%", page)
    assert captions == [(v, "52", "53") for v in VENDORS] + [(v, "61", "33") for v in VENDORS]


def test_report_gives_the_conditioning_fidelity(folder):
    report, _ = study()
    agreement = report["synthetic"]["agreement"]
    page = (folder / "report.html").read_text()
    assert f"by {agreement['mae_points']:.1f} points" in page
    assert re.search(rf"r\s+is {agreement['r']:.3f}", page)
    assert "In 1 of 201 cases it found no left ventricle" in page


@pytest.mark.parametrize(
    ("measured", "text"),
    [(None, "Nobody has measured"), ([None] * 201, "In none of the synthetic images")],
    ids=["older-run", "nothing-found"],
)
def test_where_no_ef_was_measured_the_page_says_so(tmp_path, measured, text):
    report, inputs = study()
    agreement = score([], [], 300, 0) if measured else None
    synthetic = {**report["synthetic"], "measured_ef": measured, "agreement": agreement}
    build_report({**report, "synthetic": synthetic}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert text in page and "measured against the requested" not in page


def test_models_have_plain_names_and_a_readers_order():
    keys = [
        "without_1-ge",
        "predict_the_mean",
        "epsilon_10",
        "epsilon_3",
        "local_only_2-philips",
        "prior_only",
        "federated_without_privacy",
        "pooled_real",
        "synthetic_only",
        "epsilon_0.5",
        "something_new",
    ]
    assert [model_name(key) for key in sorted(keys, key=model_rank)] == [
        "synthetic hearts only",
        "real scans, pooled",
        "sites, without privacy",
        "public prior only",
        "sites, epsilon 0.5",
        "sites, epsilon 3",
        "sites, epsilon 10",
        "site 2-philips alone",
        "without site 1-ge",
        "something new",
        "guess the mean",
    ]


def test_models_that_a_study_has_several_of_are_in_the_table_and_not_in_the_figure(tmp_path):
    report, inputs = study()
    several = {
        f"{family}{name}": report["baselines"]["prior_only"]
        for family in ("without_", "local_only_", "epsilon_")
        for name in ("1", "2", "3")
    }
    build_report({**report, "baselines": report["baselines"] | several}, inputs, tmp_path)
    page = (tmp_path / "report.html").read_text()
    figure = base64.b64decode(re.search(r'svg\+xml;base64,([^"]+)', page)[1]).decode()
    for name in ("without site 2", "site 3 alone", "sites, epsilon 1"):
        assert f'<th scope="row">{name}</th>' in page and name not in figure
    assert "public prior only" in figure and "Only in the table: sites, epsilon 1;" in page


def test_the_trainings_of_the_cross_vendor_evaluation_are_one_bar_and_no_curve(tmp_path):
    report, inputs = study()
    stages = {
        "regressor": 10.0,
        "matrix/synthetic/GE": 20.0,
        "matrix/synthetic/without GE": 30.0,
        "matrix/real/GE": 7.0,
    }
    timing = {**report["timing"], "seconds_per_stage": stages}
    curves = {**inputs.curves, **dict.fromkeys(stages, ([20, 40], [0.1, 0.05]))}
    build_report({**report, "timing": timing}, ReportInputs(**{**vars(inputs), "curves": curves}), tmp_path)
    page = (tmp_path / "report.html").read_text()
    bars = re.findall(r"<span>([^<]+)</span><i [^>]*></i><b>([^<]+)</b>", page)
    assert bars == [("regressor", "10 s"), ("cross-vendor, synthetic", "50 s"), ("cross-vendor, real", "7 s")]
    figure = base64.b64decode(re.search(r'base64,([^"]+)" alt="Training loss', page)[1]).decode()
    assert "regressor" in figure and "cross-vendor" not in figure


def test_groups_put_the_main_model_first_and_do_not_repeat_a_single_vendor():
    report, _ = study()
    groups = groups_of(report)
    assert list(groups) == [*VENDORS, "all vendors"]
    assert list(groups["GE"]) == ["synthetic hearts only", "public prior only", "guess the mean"]
    single = {"acdc": table([0.5, 0.3], [0.6, 0.4], ["Siemens"] * 2, 100, 0)}
    assert list(groups_of({**report, "regression": single, "baselines": {}})) == ["Siemens"]


def test_page_of_a_run_without_results_or_privacy(tmp_path):
    report, _ = study()
    synthetic = {
        "n_cases": 0,
        "per_vendor": {},
        "requested_ef": None,
        "mask_ef": None,
        "measured_ef": None,
        "agreement": None,
    }
    empty = {
        **report,
        "regression": {},
        "baselines": {},
        "synthetic": synthetic,
        "privacy": {
            "unit": "one patient",
            "accountant": None,
            "delta": 0.001,
            "epsilon": None,
            "sites": {"A": {"epsilon": None, "steps": 3, "refused": 0}},
        },
    }
    build_report(empty, ReportInputs(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "has no result" in page and "None was guaranteed" in page


def test_hearts_bent_from_public_scans_are_called_that_and_their_terms_are_there(tmp_path):
    report, inputs = study()
    making = Making("ACDC: 79", 75, is_refined=False, terms=("ACDC is CC BY-NC-SA 4.0",))
    for made, said in ((DRAWN, "the generator rendered it"), (making, "one of 75 public scans (ACDC: 79)")):
        report["synthetic"]["making"] = made.facts()
        build_report(report, inputs, tmp_path)
        text = " ".join((tmp_path / "report.html").read_text().split())
        assert said in text
    assert "the generator rendered it" not in text and "gone over by the generator" not in text
    assert "ACDC is CC BY-NC-SA 4.0" in text
