"""`report.csv` holds the figures of `report.json`, all of them and no others."""

import csv
import json
from pathlib import Path

import pytest

from fedcmr.server.report.build import build_report
from fedcmr.server.report.tidy_csv import TidyRow
from tests.server.report.report_study import full_study

AUDIT = {
    "canaries": [
        {
            "build": "sound",
            "control": control,
            "claimed_epsilon": 7.98,
            "lower_bound": bound,
            "num_correct": 9,
            "num_guesses": 10,
            "highest_provable": 2.5,
            "verdict": "not refuted",
            "family": "gaussian",
        }
        for control, bound in ((False, 1.03), (True, 0.0))
    ],
    "membership": {
        "loss": {
            "num_members": 30,
            "num_others": 29,
            "auc": 0.51,
            "auc_ci95": [0.47, 0.55],
            "tpr": 0.01,
            "tpr_ci95": [0.0, 0.03],
            "largest_member": 2.9,
            "largest_other": 3.1,
            "control_auc": 0.5,
            "p_control": 1.0,
            "control_holds": True,
        }
    },
    "copies": {
        "num_images": 36,
        "num_training": 12,
        "num_held_out": 4,
        "share": 0.55,
        "share_ci95": [0.46, 0.64],
        "num_copies": 0,
        "num_near_held_out": 2,
    },
}
LISTS = {"requested_ef", "mask_ef", "measured_ef"}
"""One value per synthetic case: a plot and no table."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    build_report(*full_study(), folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> list[TidyRow]:
    with (folder / "report.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["section", "model", "test_set", "group", "metric", "value", "low", "high"]
    return [TidyRow(*line[:5], *(float(cell) if cell else None for cell in line[5:])) for line in lines[1:]]


def figures_of(value, key: str = "") -> list:
    """Every number below a key of the JSON, and every null where a number could stand."""
    if isinstance(value, dict):
        return [number for name, item in value.items() if name not in LISTS for number in figures_of(item, name)]
    if isinstance(value, list):
        return [number for item in value for number in figures_of(item, key)]
    return [] if isinstance(value, (str, bool)) or (value is None and key in ("accountant", "ci95")) else [value]


def test_every_number_of_the_json_is_in_the_csv_as_often(folder, rows):
    report = json.loads((folder / "report.json").read_text())
    kept = {key: value for key, value in report.items() if key not in ("settings", "versions", "simulated")}
    expected = [number for number in figures_of(kept) if number is not None]
    for row in kept["uncertainty"].values():
        for coverage in row["coverage"]:
            expected.remove(coverage["nominal"])  # part of the metric's name
    shown = [number for row in rows for number in (row.value, row.low, row.high) if number is not None]
    assert sorted(shown) == sorted(expected)


def test_a_row_is_found_by_its_names(folder, rows):
    report = json.loads((folder / "report.json").read_text())
    found = {row[:5]: row[5:] for row in rows}
    assert len(found) == len(rows), "no two rows have the same names"
    for vendor in ("GE", "all"):
        score = report["baselines"]["prior_only"]["hospitals"][vendor]
        assert found["results", "prior_only", "hospitals", vendor, "r2"] == (score["r2"], *score["ci95"]["r2"])
        score = report["matrix"]["real"]["Siemens"][vendor]
        place = ("matrix real", "Siemens", "", vendor, "mae_points")
        assert found[place] == (score["mae_points"], *score["ci95"]["mae_points"])
        difference = report["matrix_differences"]["synthetic"]["without GE"][vendor]
        place = ("matrix synthetic minus all", "without GE", "", vendor, "difference_points")
        assert found[place] == (difference["difference_points"], *difference["ci95"])
    assert found["uncertainty", "synthetic_only", "hospitals", "all", "coverage_0.9"] == (0.76, 0.62, 0.87)
    assert found["privacy", "", "", "ge-site", "epsilon"] == (7.9, None, None)
    assert found["audit canaries", "sound", "", "", "lower_bound"] == (1.03, None, None)
    assert found["audit canaries", "control", "", "", "lower_bound"] == (0.0, None, None)
    assert found["audit membership", "loss", "", "", "auc"] == (0.51, 0.47, 0.55)


def test_what_is_undefined_is_an_empty_cell(rows):
    undefined = [
        row for row in rows if row[:4] == ("matrix real", "without GE", "", "GE") and row.metric == "mae_points"
    ]
    assert [row[5:] for row in undefined] == [(None, None, None)]
