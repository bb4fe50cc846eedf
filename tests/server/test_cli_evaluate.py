"""`fedcmr-server evaluate`: its tables, JSON and CSV, and what it says of folders and models that are odd."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.cli import main
from fedcmr.server.evaluation.disclosure import published
from fedcmr.server.evaluation.export import as_csv
from fedcmr.server.evaluation.score import METRICS
from fedcmr.server.evaluation.subgroups import subgroup_tables
from fedcmr.shared import checkpoint
from fedcmr.shared.case import load_cases, save_case, write_index
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, load_regressor, save_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

SETTINGS = ["--set", "evaluation.num_bootstrap=100", "regression.num_tta=1", "device=cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ResNet50 of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_regressor(path, Regressor())
    return path


@pytest.fixture
def folder(tmp_path, write_cases):
    """Ten Philips patients of a site."""
    write_cases(tmp_path / "site", "Philips", 10, seed=5)
    return tmp_path / "site"


def change(folder, *changes):
    """Other rows for the first cases of a folder."""
    infos = [case.info for case in load_cases(folder)]
    write_index(
        folder, [*(replace(info, **new) for info, new in zip(infos, changes, strict=False)), *infos[len(changes) :]]
    )


def evaluate(model, *folders, options=("--json",)):
    return main(["evaluate", "--model", str(model), "--test", *map(str, folders), *options, *SETTINGS])


def test_json_and_csv_hold_the_subgroups_and_nothing_of_a_patient(model, folder, tmp_path, capsys):
    change(folder, *[{"sex": "F", "pathology": "DCM", "field_strength_t": 3.0}] * 5, *[{"sex": "M"}] * 5)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert evaluate(model, folder, options=["--json", "--csv", str(tmp_path / "scores.csv")]) == 0
    printed = capsys.readouterr()
    shown = json.loads(printed.out)
    assert set(shown) == {"regression", "baselines", "subgroups", "uncertainty"}
    cases = load_cases(folder)
    true, predicted = [patient_ef(case) for case in cases], predict(load_regressor(model), cases, 1).ef
    expected = subgroup_tables(cases, true, predicted, 100, seed=0)
    assert shown["subgroups"][str(folder)] == json.loads(json.dumps(published(expected, rounded=True)))
    assert list(expected) == ["field strength", "pathology", "sex"]
    assert (tmp_path / "scores.csv").read_text() == as_csv(shown)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*before, "scores.csv"])
    output = printed.out + printed.err + (tmp_path / "scores.csv").read_text()
    assert not any(case.info.pseudonym in output for case in cases)


def test_the_tables_are_printed_with_subgroups_where_something_is_known(model, folder, capsys):
    change(folder, *[{"field_strength_t": math.nan}] * 10)
    assert evaluate(model, folder, options=[]) == 0
    bare = capsys.readouterr().out
    assert "EF class" in bare and "predict the mean" in bare and "by group" not in bare
    change(folder, *[{"sex": "F"}] * 5, *[{"sex": "M"}] * 5)
    assert evaluate(model, folder, options=[]) == 0
    assert "by group" in (printed := capsys.readouterr().out) and "field strength" not in printed


def test_a_vendor_that_nobody_knows_counts_as_unknown_and_is_not_named(model, folder, tmp_path, capsys):
    change(folder, *[{"vendor": "Nikon of Dr Smith"}] * 4, {"vendor": "unknown"})
    assert evaluate(model, folder, options=["--json", "--csv", str(tmp_path / "s.csv")]) == 0
    printed = capsys.readouterr()
    tables = json.loads(printed.out)["regression"][str(folder)]
    assert {group: values["n_patients"] for group, values in tables.items()} == {"Philips": 5, "all": 10, "unknown": 5}
    assert "4 of 10 cases name a vendor that is none of Siemens" in printed.err
    assert "Smith" not in printed.out + printed.err + (tmp_path / "s.csv").read_text()


def test_a_folder_without_any_ejection_fraction_is_one_line(model, folder, capsys):
    for case in load_cases(folder):
        save_case(folder, replace(case, masks=np.zeros_like(case.masks)))
    change(folder, *[{"ef": math.nan}] * 10)
    assert evaluate(model, folder) == 2
    assert "no case with an ejection fraction" in capsys.readouterr().err.splitlines()[-1]


def test_patients_without_an_ejection_fraction_are_left_out_and_counted(model, folder, capsys):
    first = load_cases(folder)[0]
    save_case(folder, replace(first, masks=np.zeros_like(first.masks)))
    change(folder, {"ef": math.nan})
    assert evaluate(model, folder) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["regression"][str(folder)]["all"]["n_patients"] == 9
    assert "1 of 10 cases are without an ejection fraction" in printed.err


def test_fewer_than_five_patients_have_figures_only_where_they_are_simulated(model, tmp_path, write_cases, capsys):
    folder = tmp_path / "few"
    write_cases(folder, "GE", 4, seed=5)
    assert evaluate(model, folder) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "fewer than 5 patients" in printed.err
    (folder / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    assert evaluate(model, folder) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)["regression"][str(folder)]["all"]
    assert values["n_patients"] == 4 and values["mae_points"] > 0 and values["r2"] is None
    assert "4 patients are too few to evaluate a model on" in printed.err


def test_no_printed_group_has_fewer_than_five_patients_and_none_can_be_subtracted(model, folder, tmp_path, capsys):
    change(folder, {"sex": "F", "vendor": "GE"}, *[{"sex": "M"}] * 9)
    assert evaluate(model, folder, options=["--json", "--csv", str(tmp_path / "s.csv")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "sex" not in shown["subgroups"][str(folder)], "one woman is nine men subtracted from ten patients"
    assert set(shown["regression"][str(folder)]) == {"others", "all"}
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(int(row["value"]) >= 5 for row in rows if row["metric"] == "n_patients")
    errors = [row["value"] for row in rows if row["metric"] == "mae_points"]
    assert errors and all(len(error.partition(".")[2]) <= 1 for error in errors), "real patients' figures are rounded"


def test_equal_truths_leave_r2_and_r_undefined(model, folder, capsys):
    change(folder, *[{"ef": 0.55}] * 10)
    assert evaluate(model, folder) == 0
    values = json.loads(capsys.readouterr().out)["regression"][str(folder)]["all"]
    assert values["r2"] is values["r"] is values["ci95"]["r2"] is None
    assert values["mae_points"] is not None and values["ci95"]["mae_points"] is not None


@pytest.mark.slow
def test_weights_that_hold_nan_leave_a_marked_gap(folder, tmp_path, capsys):
    broken = Regressor()
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    save_regressor(tmp_path / "nan.safetensors", broken)
    assert evaluate(tmp_path / "nan.safetensors", folder) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)["regression"][str(folder)]["all"]
    assert (values["n_patients"], values["n_undefined"]) == (10, 10)
    assert {values[name] for name in METRICS} == {None}
    assert "no prediction for 10 of 10 patients" in printed.err
    assert evaluate(tmp_path / "nan.safetensors", folder, options=[]) == 0
    assert "10, 10 undefined" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_of_another_shape_is_one_line(model, folder, tmp_path, capsys):
    arrays, metadata = checkpoint.load(model)
    name = max(arrays, key=lambda key: arrays[key].size)
    for other in (
        {**arrays, name: arrays[name][:1]},
        {name: arrays[name]},
        {**arrays, "more": np.zeros(3, np.float32)},
    ):
        checkpoint.save(tmp_path / "other.safetensors", other, metadata)
        assert evaluate(tmp_path / "other.safetensors", folder) == 2
        assert "weights of another network" in capsys.readouterr().err.splitlines()[-1]
    checkpoint.save(tmp_path / "other.safetensors", arrays, {})
    assert evaluate(tmp_path / "other.safetensors", folder) == 2
    assert "not a model of a task" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scores.txt", "model.safetensors", "nowhere/scores.csv"])
def test_a_csv_goes_to_a_csv_file_only_and_nothing_is_read_before(name, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("precious")
    assert evaluate(tmp_path / "missing", tmp_path, options=["--csv", str(tmp_path / name)]) == 2
    assert "Expected --csv" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_several_folders_are_test_sets_of_their_own(model, folder, tmp_path, write_cases, capsys):
    write_cases(tmp_path / "other", "GE", 5, seed=6)
    assert evaluate(model, folder, tmp_path / "other", options=["--csv", str(tmp_path / "s.csv")]) == 0
    with (tmp_path / "s.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "n_patients" and row["group_kind"] == "all"]
    assert [(row["model"], row["test_set"], row["value"]) for row in rows] == [
        ("model", str(folder), "10"),
        ("model", str(tmp_path / "other"), "5"),
        ("predict_the_mean", str(folder), "10"),
        ("predict_the_mean", str(tmp_path / "other"), "5"),
    ]


def test_the_help_says_what_is_not_written(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "no image and no patient's own value is written" in text and "--csv PATH" in text
