"""The benchmark's own figures: noise shrinks with patients and epsilon, sampling with patients alone."""

import json

import numpy as np
import pytest

from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.run_folder import RunFolder
from fedcmr.simulations.benchmarks import federated_evaluation as benchmark


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    true, predicted = benchmark.stated_patients(rng)
    assert 100 * np.abs(predicted - true).mean() == pytest.approx(6, abs=0.1)
    return {
        (num, epsilon): benchmark.private_cost(true, predicted, num, epsilon, 100, rng)["mae_points"]
        for num, epsilon in ((20, 8.0), (80, 8.0), (80, 3.0))
    }


def test_noise_falls_with_patients_and_epsilon_and_sampling_with_patients(rows):
    assert rows[20, 8.0]["noise_sd"] == pytest.approx(4 * rows[80, 8.0]["noise_sd"], rel=0.1)
    assert rows[80, 3.0]["noise_sd"] > 2 * rows[80, 8.0]["noise_sd"]
    assert rows[20, 8.0]["sampling_sd"] == pytest.approx(2 * rows[80, 8.0]["sampling_sd"], rel=0.3)


def test_intervals_hold_the_truth(rows):
    assert rows[80, 8.0]["shown"] == 1 and rows[80, 8.0]["interval_holds"] >= 0.9


def test_the_answers_of_a_run_can_be_drawn_from(make_study, monkeypatch, tmp_path, capsys):
    run: RunFolder = make_study()
    (run.path / "private" / "predictions").mkdir(parents=True)
    answers = {"ward": {"vendors": ["GE"] * 3, "true": [0.3, 0.5, 0.6], "predicted": [0.35, 0.5, 0.5]}}
    (run.path / "private" / "predictions" / f"{MAIN_MODEL}.json").write_text(json.dumps(answers))
    monkeypatch.setattr(benchmark, "NUM_PATIENTS", (20,))
    out = tmp_path / "figures.json"
    monkeypatch.setattr("sys.argv", ["benchmark", str(run.path), "--draws", "5", "--json", str(out)])
    assert benchmark.main() == 0
    found = json.loads(out.read_text())
    assert found["mae_points"] == pytest.approx(5) and [row["epsilon"] for row in found["rows"]] == [1, 3, 8]
    (run.path / "private" / "predictions" / f"{MAIN_MODEL}.json").unlink()
    assert benchmark.main() == 2
    assert "holds no answers of the main model" in capsys.readouterr().err
