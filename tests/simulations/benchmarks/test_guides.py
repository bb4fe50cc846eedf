"""The comparison of guides: every row is made, learnt from and tested once."""

import json

import pytest

from fedcmr.shared.provenance import public
from fedcmr.simulations.benchmarks.guides import REAL, SETS, main

TINY = ["segmentation.num_steps=2", "segmentation.batch_size=2", "synthesis.num_slices=3", "device=cpu"]


@pytest.fixture
def folders(tmp_path, write_cases):
    for name, seed in (("public", 1), ("development", 2)):
        write_cases(tmp_path / name, "GE", 8, seed=seed)
        (tmp_path / name / "prepared.json").write_text(json.dumps({"provenance": public("Sunnybrook").as_json()}))
    return tmp_path


@pytest.mark.slow
def test_every_row_is_made_and_the_first_is_compared_with(folders, tiny_prior, capsys):
    arguments = ["--guides", str(folders / "public"), "--test", str(folders / "development"), "--num", "8"]
    out = ["--out", str(folders / "out"), "--steps", "2", *TINY, f"prior={tiny_prior}"]
    assert main([*arguments, *out]) == 0
    found = json.loads((folders / "out" / "guides.json").read_text())
    assert found["num_guides"] == 8 and [row["name"] for row in found["rows"]] == [*SETS, REAL]
    assert found["rows"][0]["difference"]["difference_points"] == 0
    assert all("fidelity" in row for row in found["rows"][:-1])
    before = (folders / "out" / "scans.safetensors").stat().st_mtime_ns
    assert main([*arguments, *out]) == 0
    assert (folders / "out" / "scans.safetensors").stat().st_mtime_ns == before, "what is there is not made again"
    capsys.readouterr()


def test_guides_are_no_test_patients(folders, tiny_prior, capsys):
    arguments = ["--guides", str(folders / "public"), "--test", str(folders / "public"), "--out", str(folders / "out")]
    assert main([*arguments, *TINY, f"prior={tiny_prior}"]) == 2
    assert "synthesis.guides holds 8 patients" in capsys.readouterr().err
