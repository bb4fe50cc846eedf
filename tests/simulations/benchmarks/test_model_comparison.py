"""Kinds of generative models compared: the distance where it is known, and the command on few images."""

import json

import numpy as np
import pytest
from scipy.linalg import sqrtm

from fedcmr.simulations.benchmarks import model_comparison
from fedcmr.simulations.benchmarks.model_comparison import frechet_distance, main


def test_frechet_distance_where_it_is_known():
    x = np.random.default_rng(0).normal(size=(400, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 3) == pytest.approx(5 * 9)
    centred = x - x.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(x, rowvar=False)))
    y = np.random.default_rng(2).normal(size=(300, 5))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected)


@pytest.mark.slow
def test_the_command_trains_generates_and_resumes(tmp_path, monkeypatch, capsys):
    out, figures = tmp_path / "kinds", tmp_path / "kinds.json"
    arguments = [
        "kinds",
        "--minutes",
        "0.02",
        "--num-hearts",
        "8",
        "--num-cases",
        "4",
        "--out",
        str(out),
        "--kinds",
        "diffusion,latent_flow",
        "--json",
        str(figures),
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--plot", str(tmp_path / "kinds.png")])
    assert main() == 0
    first = json.loads(figures.read_text())
    rows = first["rows"]
    assert [row["kind"] for row in rows[::2]] == ["rendered hearts", "diffusion", "latent_flow"]
    assert rows[0]["style_error"] == 0 and rows[0]["r"] > 0.9
    assert all(row["train_steps"] >= 1 and row["ms_per_pair"] > 0 for row in rows[2:])
    assert all(row["distance"] > rows[0]["distance"] for row in rows[2:])  # a second of training makes noise
    assert (tmp_path / "kinds.png").stat().st_size > 1000

    assert sorted(path.name for path in out.iterdir()) == ["diffusion.safetensors", "latent_flow.safetensors"]
    monkeypatch.setattr(model_comparison, "train_prior", None)  # the models are there
    assert main() == 0
    again = json.loads(figures.read_text())["rows"]
    assert [row["distance"] for row in again] == [row["distance"] for row in rows]

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "1"])
    assert main() == 2 and "remove it or give another --out" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--kinds", "gan"])
    assert main() == 2 and "--kinds names 'gan'" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--plot", str(tmp_path / "nowhere" / "kinds.png")])
    assert main() == 2 and "for --plot in a folder that is there" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--num-cases", "0"])
    assert main() == 2 and "--num-cases 0" in capsys.readouterr().err
