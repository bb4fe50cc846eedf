"""The comparison of segmenters: every row is trained once, tested, and compared with the first."""

import json

import pytest
import torch

from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS
from fedcmr.simulations.benchmarks.segmentation import main

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


@pytest.mark.slow
def test_networks_are_compared(folders, monkeypatch):
    from fedcmr.simulations.benchmarks import segmentation

    monkeypatch.setattr(segmentation, "DEFAULT_WIDTHS", dict.fromkeys(NETWORKS, 8))
    rows = run(folders, "networks")
    assert [row["network"]["network"] for row in rows] == list(NETWORKS)
    assert all(row["parameters"] > 0 for row in rows) and torch.get_num_threads() >= 1


def test_bad_input_is_one_line(folders, capsys):
    assert main(["losses", "--test", str(folders / "test"), "--out", str(folders / "o"), "--set", "device=cpu"]) == 2
    assert "give folders of cases with --train" in capsys.readouterr().err
