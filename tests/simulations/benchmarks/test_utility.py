"""The utility benchmark: its rows, its seeds on the same patients, its figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from fedcmr.server.run_folder import load_run, open_run
from fedcmr.server.settings import BASELINES, load
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError
from fedcmr.simulations.benchmarks.seeds import default_rows, models_of, prepare_seeds, run_seeds, with_rows
from fedcmr.simulations.benchmarks.utility import compare, requirement

pytestmark = pytest.mark.slow

SITES = {"1-siemens": "Siemens", "2-ge": "GE"}
SMALL = (
    "federation.num_rounds=2",
    "federation.local_steps=1",
    "federation.num_views=2",
    "federation.num_processes=1",
    "synthesis.num_cases=4",
    "synthesis.num_slices=2",
    "synthesis.num_steps=1",
    "regression.num_steps=1",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "evaluation.num_bootstrap=200",
    "device=cpu",
)


def predictions(models, seed: int, num: int = 12):
    """Predictions of one seed: errors around the same truth, smaller for earlier models."""
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99)
    true, vendors = truth.uniform(0.2, 0.7, num).tolist(), ["Siemens", "GE"] * (num // 2)
    return {
        model: {
            "hospitals": {
                "vendors": vendors,
                "true": true,
                "predicted": (true + rng.normal(0, 0.03 * (k + 1), num)).tolist(),
            }
        }
        for k, model in enumerate(models)
    }


def test_figures_are_means_over_seeds_and_differences_are_paired():
    models = ["synthetic_only", "pooled_real", "without_2-ge"]
    seeds = [predictions(models, seed) for seed in range(3)]
    figures = compare(seeds, models, SITES, 500, seed=0)["hospitals"]
    assert set(figures["rows"]) == set(models) and set(figures["main_minus"]) == {"pooled_real", "without_2-ge"}

    def mean_over_seeds(model, metric, chosen):
        predictions = [seed[model]["hospitals"] for seed in seeds]
        return np.mean([metric(np.array(a["true"])[chosen], np.array(a["predicted"])[chosen]) for a in predictions])

    for vendor, chosen in {"Siemens": slice(0, None, 2), "GE": slice(1, None, 2), "all": slice(None)}.items():
        maes = {model: 100 * mean_over_seeds(model, metrics.mean_absolute_error, chosen) for model in models}
        for model in models:
            row = figures["rows"][model][vendor]
            assert row["mae_points"] == pytest.approx(maes[model])
            assert row["r2"] == pytest.approx(mean_over_seeds(model, metrics.r2_score, chosen))
            assert len(row["per_seed"]["mae_points"]) == 3
            assert np.mean(row["per_seed"]["mse"]) == pytest.approx(row["mse"])
        for model in models[1:]:
            difference = figures["main_minus"][model][vendor]
            assert difference["difference_points"] == pytest.approx(maes["synthetic_only"] - maes[model])
            assert difference["ci95"][0] <= difference["difference_points"] <= difference["ci95"][1]


def test_the_requirements_stand_at_the_rows_they_are_about():
    models = ["synthetic_only", "pooled_real", "prior_only", "without_2-ge"]
    pairs = compare([predictions(models, 0)], models, SITES, 100, seed=0)["hospitals"]["main_minus"]
    required = {(model, vendor) for model in pairs for vendor in pairs[model] if pairs[model][vendor]["required"]}
    assert required == {("pooled_real", "Siemens"), ("pooled_real", "GE"), ("without_2-ge", "GE")}


@pytest.mark.parametrize(
    ("model", "vendor", "main_minus", "sites", "met"),
    [
        ("pooled_real", "GE", 2.0, SITES, True),
        ("pooled_real", "GE", 2.1, SITES, False),
        ("without_2-ge", "GE", -3.0, SITES, True),
        ("without_2-ge", "GE", -3.1, SITES, False),
        ("without_2-ge", "Siemens", -9.0, SITES, None),
        ("without_2-ge", "GE", -9.0, {**SITES, "3-ge": "GE"}, None),  # another site has taught the vendor
        ("pooled_real", "Siemens", 9.0, {"A": "Siemens", "B": "Siemens"}, None),
        ("pooled_real", "GE", None, SITES, None),
    ],
)
def test_a_requirement_is_met_up_to_its_limit(model, vendor, main_minus, sites, met):
    found = requirement(model, vendor, main_minus, sites)
    assert (found["met"] if found else None) is met


def test_seeds_of_other_patients_are_refused():
    models = ["synthetic_only"]
    other = predictions(models, 1)
    other["synthetic_only"]["hospitals"]["true"][0] += 0.01
    with pytest.raises(UserError, match="patients of the seeds differ"):
        compare([predictions(models, 0), other], models, SITES, 100, seed=0)


def test_rows_by_default_are_all_that_differ_from_each_other():
    assert set(default_rows(load("default"))) == {*BASELINES, "epsilon_1", "epsilon_3"}
    two = default_rows(load("acdc", ["data_root=x", "privacy.target_epsilon=3"]))
    assert set(two) == {*BASELINES, "epsilon_1"} - {"leave_one_site_out"}
    one = default_rows(load("default", ["hospitals.vendors=[GE]", "privacy.enabled=false"]))
    assert set(one) == {"predict_the_mean", "prior_only", "pooled_real", "epsilon_1", "epsilon_3"}


def test_rows_become_settings_and_models():
    evaluation = with_rows(load("default").evaluation, ["leave_one_site_out", "epsilon_0.5", "pooled_real"])
    assert (evaluation.baselines, evaluation.epsilons) == (["leave_one_site_out", "pooled_real"], [0.5])
    config = load("default")
    config.evaluation = evaluation
    assert models_of(config, ["a", "b"]) == [
        "synthetic_only",
        "pooled_real",
        "epsilon_0.5",
        "without_a",
        "without_b",
    ]
    for wrong in ("magic", "epsilon_", "epsilon_x", "1"):
        with pytest.raises(UserError, match=f"--rows: .*'{wrong}'"):
            with_rows(evaluation, [wrong])


def test_rows_are_asked_for_once_also_next_to_a_setting_that_needs_one():
    command = [
        sys.executable,
        "-m",
        "fedcmr.simulations.benchmarks.utility",
        "evaluation.cross_vendor=[real]",
        "--rows",
    ]
    refused = {
        rows: subprocess.run([*command, rows], capture_output=True, text=True) for rows in ("magic", "prior_only")
    }
    assert {process.returncode for process in refused.values()} == {2}
    assert "--rows" in refused["magic"].stderr and "evaluation.cross_vendor" in refused["prior_only"].stderr
    with_pooled = subprocess.run([*command, "pooled_real", "--mnms", "nowhere"], capture_output=True, text=True)
    assert with_pooled.returncode == 2 and "--mnms" in with_pooled.stderr


def test_a_failing_seed_is_named_with_the_place_of_its_message(tmp_path):
    path = tmp_path / "bad-seed0"
    open_run(path, load("smoke", ["prior=nowhere.safetensors"]))
    with pytest.raises(UserError, match=r"bad-seed0: .* exit code 2, .*bad-seed0\.log"):
        run_seeds([path], ["synthetic_only"], num_jobs=2)
    assert "nowhere.safetensors" in path.with_name("bad-seed0.log").read_text()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory, write_cases) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number, (name, vendor) in enumerate(SITES.items()):
        write_cases(root / name / "train", vendor, 3, number)
        write_cases(root / name / "test", vendor, 2, 50 + number)
    return root


def benchmark(tmp_path: Path, data_root: Path, prior: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "fedcmr.simulations.benchmarks.utility",
        "--config",
        "smoke",
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "figures.json",
        *arguments,
        "hospitals.source=prepared",
        "hospitals.nominal_patients=6",
        f"data_root={data_root}",
        f"prior={prior}",
        *SMALL,
    ]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)


def test_two_seeds_share_patients_and_a_finished_one_is_not_done_again(tmp_path, data_root, tiny_prior):
    done = benchmark(tmp_path, data_root, tiny_prior, "--seeds", "2", "--jobs", "2", "--rows", "predict_the_mean")
    assert done.returncode == 0, done.stderr
    assert "SD of seeds" in done.stdout and "guess the mean" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["seeds"] == [0, 1]
    row = figures["test_sets"]["hospitals"]["rows"]["synthetic_only"]
    assert row["all"]["n_patients"] == 4 and len(row["GE"]["per_seed"]["mae_points"]) == 2

    first, second = (tmp_path / "out" / f"smoke-seed{seed}" for seed in (0, 1))
    assert (second / "test").resolve() == (first / "test").resolve()
    assert load_run(second).config.seed == 1
    ids = [checkpoint.load(path / "generator.safetensors")[1]["run_id"] for path in (first, second)]
    assert ids[0] != ids[1], "each seed is a federation of its own, with noise of its own"
    predictions = [
        json.loads((path / "private" / "predictions" / "synthetic_only.json").read_text()) for path in (first, second)
    ]
    assert predictions[0]["hospitals"]["true"] == predictions[1]["hospitals"]["true"]
    assert predictions[0] != predictions[1]

    before = {path: path.stat().st_mtime_ns for path in (first / "metrics.jsonl", first / "generator.safetensors")}
    config = load(first / "config.yaml")
    paths = prepare_seeds(config, tmp_path / "out", "smoke", 2)
    assert paths == [first, second]
    run_seeds(paths, models_of(config, list(SITES)), num_jobs=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished seed is not run again"
    config.synthesis.num_steps = 2
    with pytest.raises(UserError, match=r"smoke-seed0 belongs to other settings .*num_steps: 1"):
        prepare_seeds(config, tmp_path / "out", "smoke", 2)
