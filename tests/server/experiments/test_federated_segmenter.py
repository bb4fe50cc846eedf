"""A study with rounds for the segmenter, from the sites to the report's rows."""

import csv
import json

import numpy as np
import pytest

from fedcmr.server.experiments.federated_segmenter import segmenter_differences
from fedcmr.server.tasks.segmentation.scores import paired_dice
from fedcmr.simulations.grid import make_grid, run_server_app
from tests.server.experiments.test_studied_tasks import BOTH, SMALL, give_test_patients


@pytest.mark.slow
def test_a_study_tunes_the_public_segmenter_and_reports_it_beside_the_others(make_study, write_cases):
    run = make_study(
        *SMALL[:-2], BOTH, "federation.segmenter_rounds=1", "federation.local_steps=1", "evaluation.baselines=[]"
    )
    give_test_patients(run, write_cases)
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path), "rehearsal": True})
    rehearsed = json.loads((run.path / "rehearsal.json").read_text())
    assert rehearsed["reasons"] == [] and rehearsed["rounds"] == {"statistics": 1, "gradients": 1, "segmenter": 1}
    assert all(site["codes"]["segmenter"] == "ok" for site in rehearsed["sites"].values())

    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path)})
    report, page = json.loads((run.path / "report.json").read_text()), (run.path / "report.html").read_text()
    spent = report["privacy"]
    assert spent["epsilon"] == pytest.approx(rehearsed["sites"]["a"]["epsilon"]) and spent["epsilon"] <= 8
    assert spent["segmenter_rounds"] == 1 and spent["sites"]["a"]["steps"] == 2 + 1 + 1
    part = report["tasks"]["segmentation"]
    assert set(part["baselines"]) == {"federated_segmenter", "public_segmenter"}
    tuned, public = (part["baselines"][f"{name}_segmenter"]["hospitals"]["all"] for name in ("federated", "public"))
    difference = part["differences"]["hospitals"]["all"]
    assert difference["n_patients"] == tuned["n_patients"] == 12
    means = 100 * (tuned["dice"]["mean"] - public["dice"]["mean"])
    assert difference["difference_points"] == pytest.approx(means, abs=1e-6)
    section = page[page.index('<h2 id="segmentation">') :]
    assert "public segmenter, tuned at the sites</th>" in section and "patient by patient" in section
    assert "part of the same ε" in page[page.index('<h2 id="privacy">') :]
    rows = list(csv.DictReader((run.path / "report.csv").open()))
    (row,) = [r for r in rows if r["section"] == "segmentation minus public segmenter" and r["group"] == "all"][1:2]
    assert row["metric"] == "difference_points" and float(row["value"]) == difference["difference_points"]
    assert (
        "one round in which the sites tuned the public segmenter" in (run.path / "synthetic/DATASHEET.md").read_text()
    )
    assert run.is_done("federated_segmenter")


def values_of(means, drawn=None):
    drawn = [1.0] * len(means) if drawn is None else drawn
    names = ("lv", "myo", "rv", "mean", "ef")
    return {"dice/mean": means, **{f"num_phases/{name}": [2 * value for value in drawn] for name in names}}


def test_the_difference_is_of_patients_and_not_of_means():
    one, other = np.linspace(0.7, 0.9, 10), np.linspace(0.6, 0.8, 10)
    table = paired_dice(values_of(one), values_of(other), ["GE"] * 5 + ["Philips"] * 5, 200, 0)
    assert set(table) == {"GE", "Philips", "all"} and table["all"]["n_patients"] == 10
    assert table["all"]["difference_points"] == pytest.approx(10)
    np.testing.assert_allclose(table["all"]["ci95"], 10, atol=1e-9)


def test_patients_without_all_structures_are_not_in_the_difference():
    drawn = [1.0] * 5 + [0.0] * 5
    means = [0.9] * 5 + [np.nan] * 5
    table = paired_dice(values_of(means, drawn), values_of([0.8] * 10, drawn), ["GE"] * 10, 200, 0)
    assert table["all"]["n_patients"] == 5 and table["all"]["difference_points"] == pytest.approx(10)
    nobody = paired_dice(values_of([np.nan] * 5, [0.0] * 5), values_of([np.nan] * 5, [0.0] * 5), ["GE"] * 5, 200, 0)
    assert nobody["all"] == {"n_patients": 0, "difference_points": None, "ci95": None}


def test_a_study_without_such_rounds_has_no_differences(make_study):
    assert segmenter_differences({"synthetic_only": {"hospitals": {}}}, make_study(num_patients=0).config) == {}
