"""The command that compares folders of cases."""

import json
import sys

import numpy as np
import pytest

from fedcmr.shared.case import save_case, write_index
from fedcmr.simulations.benchmarks import fidelity
from tests.server.disc_case import disc_case


def write(folder, num, seed, size=64):
    cases = [disc_case(f"p{seed + i}", 0.3 + 0.02 * i, num_slices=5, size=size, seed=seed + i) for i in range(num)]
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fidelity", *map(str, arguments)])
    return fidelity.main()


def test_folders_give_a_table_and_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity.console, "width", 200)
    made, real = write(tmp_path / "made", 9, 0), write(tmp_path / "real", 8, 50)
    few, prior = write(tmp_path / "few", 3, 90), write(tmp_path / "prior", 8, 120)
    groups = ["--real", "here", real, "--real", "there", few]
    options = ["--synthetic", made, "--prior", prior, "--json", tmp_path / "f.json", "--steps", 1, "--draws", 2]
    assert run(monkeypatch, *options, *groups) == 0
    told = capsys.readouterr().out
    assert (
        "here: 8" in told
        and "4 a side" in told
        and "halves" in told
        and "prior_only" in told
        and "there: not measured" in told
    )
    group = json.loads((tmp_path / "f.json").read_text())["groups"]["here"]
    assert group["n_half"] == 4 and set(group["anatomy"]) == {"real", "synthetic", "prior_only"}
    assert 0 <= group["comparisons"]["prior_only"]["auc_image"] <= 1
    assert np.isfinite(group["comparisons"]["halves"]["wasserstein_mass_g"])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (["--draws", "1"], "--draws: expected >= 2"),
        (["--real", "alone"], "--real alone: expected a name of its own"),
        (["--prior", "nowhere"], "nowhere holds no cases.csv"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, what, says):
    made = write(tmp_path / "made", 1, 0)
    assert run(monkeypatch, "--synthetic", made, "--real", "x", made, *what) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_synthetic_cases_on_several_grids_are_refused(tmp_path, monkeypatch, capsys):
    made = write(tmp_path / "made", 1, 0)
    save_case(made, (other := disc_case("other", 0.5, size=96)))
    write_index(made, [disc_case("p0", 0.3).info, other.info])
    assert run(monkeypatch, "--synthetic", made, "--real", "x", made) == 2
    assert "all on one square grid" in capsys.readouterr().err
