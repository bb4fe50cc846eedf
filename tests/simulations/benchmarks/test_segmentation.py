"""The comparison of segmenters: every row is trained once, tested, and compared with the first."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.shared import checkpoint
from fedcmr.shared.case import load_cases
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS
from fedcmr.shared.tasks.segmentation.segmenter import Architecture, Segmenter, probabilities
from fedcmr.simulations.benchmarks.segmentation import MeanOfSegmenters, divided, main

SMALL = ["width=8", "size_px=32", "crop_px=32", "pixel_mm=4", "num_steps=1", "batch_size=2"]
SETTINGS = [word for setting in SMALL for word in ("--set", f"segmentation.{setting}")]


@pytest.fixture
def folders(tmp_path, write_cases):
    for name, seed in (("real", 1), ("made", 2), ("test", 3)):
        write_cases(tmp_path / name, "GE", 3, seed=seed)
        (tmp_path / name / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    return tmp_path


def run(folders, what, *more):
    train = ["--train", str(folders / "real"), "--test", str(folders / "test"), "--out", str(folders / "out")]
    assert main([what, *train, *SETTINGS, "--set", "device=cpu", "--set", "evaluation.num_bootstrap=100", *more]) == 0
    return json.loads((folders / "out" / f"{what}.json").read_text())["rows"]


@pytest.mark.slow
def test_sources_are_real_synthetic_both_and_none(folders, capsys):
    rows = run(folders, "sources", "--synthetic", str(folders / "made"))
    assert [row["name"] for row in rows] == ["real pooled", "synthetic only", "synthetic then real", "rendered only"]
    assert rows[0]["test"]["test"]["difference"] == 0 and rows[-1]["network"]["size_px"] == 64
    printed = capsys.readouterr().out
    assert "rendered" in printed and "sources.json" in printed
    before = {path: path.stat().st_mtime_ns for path in (folders / "out").glob("*.safetensors")}
    again = run(folders, "sources", "--synthetic", str(folders / "made"))
    assert before == {path: path.stat().st_mtime_ns for path in (folders / "out").glob("*.safetensors")}
    assert [row["test"]["test"]["dice"] for row in again] == [row["test"]["test"]["dice"] for row in rows]


def test_losses_are_compared_patient_by_patient(folders):
    rows = run(folders, "losses")
    assert [row["name"] for row in rows] == ["moving", "fixed", "cross_entropy", "dice"]
    first, other = (row["test"]["test"] for row in rows[:2])
    assert other["difference"] == pytest.approx(other["dice"]["mean"] - first["dice"]["mean"])


def test_some_rows_alone_can_be_made(folders, capsys):
    rows = run(folders, "networks", "--only", "unet", "mean of all")
    assert [row["name"] for row in rows] == ["unet", "mean of all"]
    assert rows[0]["test"]["test"]["dice"] == rows[1]["test"]["test"]["dice"], "the mean of the one that is there"
    arguments = ["--train", str(folders / "real"), "--out", str(folders / "out"), "--only", "vnet"]
    assert main(["networks", *arguments]) == 2
    assert "--only: expected some of unet, mednext, mmnet, mean of all, got vnet" in capsys.readouterr().err


def test_a_training_goes_on_from_an_earlier_one_and_its_minutes_count(folders):
    first = run(folders, "networks", "--only", "unet")[0]
    (folders / "out").rename(folders / "earlier")
    there = checkpoint.load(folders / "earlier" / "unet.safetensors")[0]
    still = ["--set", "segmentation.learning_rate=1e-12", "--start", str(folders / "earlier")]
    second = run(folders, "networks", "--only", "unet", *still)[0]
    assert second["minutes"] > first["minutes"]
    after = checkpoint.load(folders / "out" / "unet.safetensors")[0]
    weights = [name for name in there if "running" not in name and "num_batches" not in name]
    assert all(np.allclose(there[name], after[name], atol=1e-3) for name in weights)


@pytest.mark.slow
def test_without_test_patients_each_is_tested_by_a_segmenter_that_has_not_seen_it(folders, capsys):
    train = ["--train", str(folders / "real"), "--out", str(folders / "out"), *SETTINGS, "--set", "device=cpu"]
    assert main(["losses", *train, "--set", "evaluation.num_bootstrap=100"]) == 0
    rows = json.loads((folders / "out" / "losses.json").read_text())["rows"]
    assert rows[0]["test"]["held out"]["n_patients"] == 3 and (folders / "out/fold2/dice.safetensors").is_file()
    assert main(["losses", *train, "--folds", "9"]) == 2
    assert "--folds is 9: with 3 training patients take 2 to 3" in capsys.readouterr().err


def test_the_scans_of_a_patient_are_in_one_fold(folders):
    cases = [
        replace(case, info=replace(case.info, pseudonym=f"{name}{i}", group=f"patient{i}"))
        for name in ("real", "made")
        for i, case in enumerate(load_cases(folders / name))
    ]
    parts = divided(cases, 2)
    assert sorted(case.info.pseudonym for _, test in parts for case in test) == sorted(c.info.pseudonym for c in cases)
    for train, test in parts:
        assert train and test and not {case.info.group for case in train} & {case.info.group for case in test}


def test_the_mean_of_segmenters_has_the_mean_of_their_probabilities():
    members = [Segmenter(Architecture("unet", 8, 32, 4.0)).eval() for _ in range(2)]
    images = torch.randn(1, 2, 32, 32)
    expected = sum(probabilities(member, images) for member in members) / 2
    torch.testing.assert_close(probabilities(MeanOfSegmenters(members).eval(), images), expected)


@pytest.mark.slow
def test_networks_are_compared(folders, monkeypatch):
    from fedcmr.simulations.benchmarks import segmentation

    monkeypatch.setattr(segmentation, "DEFAULT_WIDTHS", dict.fromkeys(NETWORKS, 8))
    rows = run(folders, "networks")
    assert [row["name"] for row in rows] == [*NETWORKS, "mean of all"]
    assert all(row["parameters"] > 0 for row in rows) and torch.get_num_threads() >= 1


def test_bad_input_is_one_line(folders, capsys):
    assert main(["losses", "--test", str(folders / "test"), "--out", str(folders / "o"), "--set", "device=cpu"]) == 2
    assert "give folders of cases with --train" in capsys.readouterr().err
