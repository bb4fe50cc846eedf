import json
from types import SimpleNamespace

import numpy as np
import pytest

from fedcmr.server.evaluation.score import score
from fedcmr.server.experiments import models
from fedcmr.server.experiments.cross_vendor import cross_vendor_scores, train_cross_vendor, training_sets
from fedcmr.server.experiments.models import predictions_folder
from fedcmr.server.run_folder import open_run
from fedcmr.server.settings import Config, EvaluationConfig

VENDORS = ["GE", "Philips", "Siemens"]


def write_predictions(run, name, shift, rng):
    sets = {}
    for test_set in ("a", "b"):
        true = rng.uniform(0.2, 0.7, 12)
        sets[test_set] = {"vendors": VENDORS * 4, "true": true.tolist(), "predicted": (true + shift).tolist()}
    path = predictions_folder(run) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sets))
    return sets


@pytest.fixture
def run(tmp_path):
    config = Config(evaluation=EvaluationConfig(num_bootstrap=100))
    return open_run(tmp_path / "run", config)


def test_rows_are_each_vendor_and_all_but_each_without_repetition():
    assert training_sets(["Siemens", "GE", "Philips", "GE"]) == {
        "GE": {"GE"},
        "Philips": {"Philips"},
        "Siemens": {"Siemens"},
        "without GE": {"Philips", "Siemens"},
        "without Philips": {"GE", "Siemens"},
        "without Siemens": {"GE", "Philips"},
    }
    assert training_sets(["GE", "Siemens"]) == {"GE": {"GE"}, "Siemens": {"Siemens"}}
    assert training_sets(["GE", "GE"]) == {}


def test_a_row_is_trained_once_on_its_own_vendors(run, monkeypatch):
    trained = {}

    def note(run, task, name, cases, real):
        assert real and task == "ejection_fraction"
        trained[name] = sorted({case.info.vendor for case in cases})

    monkeypatch.setattr(models, "train_and_predict", note)
    cases = [SimpleNamespace(info=SimpleNamespace(vendor=vendor)) for vendor in VENDORS * 2]
    train_cross_vendor(run, "real", cases)
    assert trained["matrix/real/GE"] == ["GE"] and trained["matrix/real/without GE"] == ["Philips", "Siemens"]
    assert len(trained) == 6
    trained.clear()
    train_cross_vendor(run, "real", cases)
    assert trained == {}


def test_the_table_has_the_scores_of_its_predictions_over_all_test_sets(run):
    whole = write_predictions(run, "synthetic_only", 0.01, np.random.default_rng(1))
    for name, shift in (("GE", 0.05), ("without GE", 0.02)):
        write_predictions(run, f"matrix/synthetic/{name}", shift, np.random.default_rng(1))
    scores, differences = cross_vendor_scores(run, lambda sets: sets)
    assert list(scores) == ["synthetic"] and set(scores["synthetic"]) == {"all", "GE", "without GE"}
    assert scores["synthetic"]["GE"]["Philips"]["mae_points"] == pytest.approx(5)
    true = np.array(whole["a"]["true"] + whole["b"]["true"])
    assert scores["synthetic"]["all"]["all"] == score(true, true + 0.01, 100, 0)
    left_out = differences["synthetic"]
    assert set(left_out) == {"without GE"} and left_out["without GE"]["GE"]["difference_points"] == pytest.approx(1)


def test_without_rows_or_their_row_of_all_there_is_no_table(run):
    assert cross_vendor_scores(run, lambda sets: sets) == ({}, {})
    write_predictions(run, "matrix/real/GE", 0.1, np.random.default_rng(0))
    assert cross_vendor_scores(run, lambda sets: sets) == ({}, {})


def test_leaving_a_vendor_out_of_a_segmentation_has_the_means_of_its_patients(run):
    """Two test sets; each vendor's Dice is its own, and lower where nobody of it was trained on."""
    known = {"GE": 0.9, "Philips": 0.8, "Siemens": 0.7}
    for row, lost in (("synthetic_only", 0), ("matrix/synthetic/without GE", 0.2), ("matrix/synthetic/Philips", 0.1)):
        sets = {}
        for test_set, num in (("a", 5), ("b", 7)):
            vendors = VENDORS * num
            dice = [known[name] - lost * (name == "GE") for name in vendors]
            columns = {f"dice/{part}": dice for part in ("lv", "myo", "rv", "mean")}
            columns |= {f"hd95_mm/{part}": [4.0] * len(dice) for part in ("lv", "myo", "rv")}
            sets[test_set] = {"vendors": vendors, **columns, "ef_mae_points": [2.0] * len(dice)}
        path = predictions_folder(run, "segmentation") / f"{row}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sets))
    scores, differences = cross_vendor_scores(run, lambda by_set: by_set, "segmentation")
    rows = scores["synthetic"]
    assert list(rows) == ["Philips", "all", "without GE"] and differences == {}
    assert rows["without GE"]["GE"]["dice"]["mean"] == pytest.approx(0.7)
    assert rows["all"]["GE"]["dice"]["lv"] == pytest.approx(0.9)
    assert rows["Philips"]["all"]["dice"]["mean"] == pytest.approx((0.8 + 0.8 + 0.7) / 3)
    assert {name: score["n_patients"] for name, score in rows["without GE"].items()} == {
        "GE": 12,
        "Philips": 12,
        "Siemens": 12,
        "all": 36,
    }
