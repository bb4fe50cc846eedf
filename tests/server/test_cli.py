import json
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.cli import main
from fedcmr.server.evaluation.disclosure import published
from fedcmr.server.evaluation.tables import table
from fedcmr.shared import checkpoint
from fedcmr.shared.case import load_cases, write_index
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import load_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

NUM_STYLES = len(STYLE_NAMES)


@pytest.fixture
def finished_run(make_study, tiny_prior, write_cases):
    """A run folder whose federation is done and whose test patients are prepared."""
    run = make_study(
        "synthesis.num_cases=4", "synthesis.num_slices=2", "synthesis.num_steps=1", "evaluation.num_bootstrap=100"
    )
    prior = load_prior(tiny_prior)
    arrays = {f"trainable/{name}": value.detach().numpy() for name, value in prior.generator.trainable().items()}
    for vendor in ("GE", "Siemens"):
        arrays |= {
            f"code_mean/{vendor}": np.zeros(NUM_STYLES, np.float32),
            f"code_std/{vendor}": np.ones(NUM_STYLES, np.float32),
        }
    site = {"epsilon": 7.9, "accountant": "prv", "steps": 5, "refused": [], "releases": []}
    metadata = {
        "prior_sha256": prior.sha256,
        "delta": 1e-3,
        "sites": {"a": site, "c": site},
        "run_id": "r",
        "private": True,
    }
    checkpoint.save(run.path / "generator.safetensors", arrays, metadata)
    folder = run.path / "test" / "hospitals" / "a"
    write_cases(folder, "Siemens", 2, seed=9)
    (folder / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    write_index(folder, [replace(case.info, ef=patient_ef(case)) for case in load_cases(folder)])
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_cases):
    """A ResNet50 trained for two steps by the command, and the folder it saw."""
    folder = tmp_path_factory.mktemp("model")
    write_cases(folder / "cases", "GE", 2, seed=1)
    out = folder / "model.safetensors"
    settings = ["--set", "regression.num_steps=2", "regression.batch_size=4", "device=cpu"]
    assert main(["train", "--data", str(folder / "cases"), "--out", str(out), *settings]) == 0
    return out, folder / "cases"


def test_train_keeps_the_mean_of_its_labels_and_leaves_no_checkpoint(model):
    out, data = model
    efs = [patient_ef(case) for case in load_cases(data)]
    assert load_regressor(out).mean_ef.item() == pytest.approx(np.mean(efs), abs=1e-6)
    assert [path.name for path in out.parent.glob("*.safetensors")] == [out.name]
    card = out.with_suffix(".md").read_text()
    assert "2 patients: 2 GE." in card and "cases: real scans that are private" in card and "num_steps: 2" in card


def test_train_does_not_replace_a_model(model, capsys):
    out, data = model
    before = out.read_bytes()
    assert main(["train", "--data", str(data), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_bytes() == before


def test_evaluate_prints_the_scores_of_the_model_s_predictions(model, tmp_path, write_cases, capsys):
    out, _ = model
    write_cases(tmp_path / "philips", "Philips", 5, seed=5)
    settings = ["--set", "evaluation.num_bootstrap=100", "regression.num_tta=1", "device=cpu"]
    assert main(["evaluate", "--model", str(out), "--test", str(tmp_path / "philips"), "--json", *settings]) == 0
    shown = json.loads(capsys.readouterr().out)
    cases = load_cases(tmp_path / "philips")
    true, predicted = [patient_ef(case) for case in cases], predict(load_regressor(out), cases, 1).ef
    expected = table(true, predicted, ["Philips"] * 5, 100, seed=0)
    assert shown["regression"][str(tmp_path / "philips")] == json.loads(json.dumps(published(expected, rounded=True)))
    assert main(["evaluate", "--model", str(out), "--test", str(tmp_path / "philips"), *settings]) == 0
    printed = capsys.readouterr().out
    assert "Philips" in printed and "predict the mean" in printed


@pytest.mark.slow
def test_synthesize_writes_a_data_set_of_its_own(finished_run, tmp_path, capsys):
    out = tmp_path / "more"
    command = ["synthesize", str(finished_run.path), "--out", str(out), "--cases", "3", "--vendor", "GE", "--dicom"]
    assert main([*command, "--nifti", "--seed", "5"]) == 0
    cases = load_cases(out)
    assert [case.info.vendor for case in cases] == ["GE"] * 3
    assert len(list((out / "dicom").rglob("masks/*.dcm"))) == 3 * 2  # a segmentation of each phase
    assert len(list((out / "dicom").rglob("*.dcm"))) == 3 * 2 * 2 + 3 * 2
    assert len(list((out / "nifti" / "frames").iterdir())) == 3
    assert "epsilon = 7.90" in (out / "DATASHEET.md").read_text() and "- seed: 5" in (out / "DATASHEET.md").read_text()
    assert main(command) == 2
    assert "give a new or empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_synthesize_refuses_a_vendor_that_the_study_has_not_learnt(finished_run, tmp_path, capsys):
    assert main(["synthesize", str(finished_run.path), "--out", str(tmp_path / "x"), "--vendor", "Canon"]) == 2
    assert "Canon" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_report_is_written_again_from_the_run_folder(finished_run, capsys):
    run = finished_run.path
    assert main(["synthesize", str(run), "--out", str(run / "synthetic")]) == 0
    predictions = {"hospitals": {"vendors": ["Siemens"] * 2, "true": [0.5, 0.6], "predicted": [0.55, 0.5]}}
    (run / "private" / "predictions").mkdir(parents=True)
    (run / "private" / "predictions" / "synthetic_only.json").write_text(json.dumps(predictions))
    assert main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["regression"]["hospitals"]["all"]["mae_points"] == pytest.approx(7.5)
    assert report["synthetic"]["n_cases"] == 4
    assert "by 7.5 points on average" in (run / "report.html").read_text()


def test_pretrain_hands_its_settings_over(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("fedcmr.server.generation.pretraining.pretrain", lambda *arguments: calls.append(arguments))
    out = tmp_path / "prior.safetensors"
    assert main(["pretrain", "--out", str(out), "--minutes", "1.5", "--set", "pretrain.num_hearts=8"]) == 0
    [(config, path, minutes, public)] = calls
    assert config.pretrain.num_hearts == 8 and path == out and minutes == 1.5 and public == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["report", "nowhere"], "not a run folder"),
        (["synthesize", "nowhere", "--out", "new"], "not a run folder"),
        (["train", "--data", "nowhere", "--out", "m.safetensors"], "holds no cases.csv"),
        (["train", "--data", "nowhere", "--out", "m.pt"], "end in .safetensors"),
        (["evaluate", "--model", "nowhere.safetensors", "--test", "nowhere"], "nowhere.safetensors is missing"),
        (["evaluate", "--model", "m", "--test", "t", "--set", "regression.num_tat=1"], "num_tat"),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["pretrain", "synthesize", "train", "evaluate", "report"])
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out.split("\n\n")[1].split()) > 8


@pytest.mark.parametrize("arguments", [["synthesize", "r", "--out", "x", "--cases", "0"], ["pretrain"], []])
def test_argument_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
