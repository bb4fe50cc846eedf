"""The benchmark's benchmark takes the study's own path, and its errors vanish with the noise."""

import json
import sys

import numpy as np
import pytest
import torch

from fedcmr.server.federation.federate import federate as federate_study
from fedcmr.shared import checkpoint
from fedcmr.shared.models.prior import load_prior
from fedcmr.simulations.benchmarks import adapters as benchmark
from fedcmr.simulations.grid import make_grid

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["norm_affine", "lora"])
def test_its_federation_is_that_of_a_study(make_study, adapter):
    run = make_study("privacy.enabled=false", f"federation.adapter={adapter}", allow_without_privacy=True)
    prior = load_prior(run.prior_path())
    with make_grid(run) as grid:
        federate_study(grid, run, prior)
    published = checkpoint.load(run.path / "generator.safetensors")[0]
    folders = [run.path / "sites" / name / "train" for name in ("a", "b", "c")]
    sites = [benchmark.load_site(folder, prior) for folder in folders]
    state = benchmark.federate(prior, sites, run.config, CPU)
    assert state.adapter == adapter
    for name, array in state.ema.items():
        # The sites ran on other numbers of threads, which round differently.
        np.testing.assert_allclose(array, published[f"trainable/{name}"], rtol=1e-3, atol=1e-4)


def test_style_errors_vanish_with_the_noise(tmp_path, tiny_prior, write_cases):
    write_cases(tmp_path, "GE", 6, seed=0)
    sites = [benchmark.load_site(tmp_path, load_prior(tiny_prior))]
    wide = ["privacy.statistics_clip=40"]  # clips nobody
    errors = [benchmark.style_errors(sites, wide, epsilon, 0.5)["mean"] for epsilon in (1.0, 60.0)]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.slow
def test_it_prints_and_writes_what_it_measured(tmp_path, tiny_prior, write_cases, monkeypatch, capsys):
    for name in ("a", "b", "out"):
        write_cases(tmp_path / name, "GE", 3, seed=ord(name[0]))
    arguments = [
        "--cases",
        tmp_path / "a",
        tmp_path / "b",
        "--held-out",
        tmp_path / "out",
        "--patients",
        "2",
        "99",
        "--epsilons",
        "8",
        "inf",
        "--draws",
        "2",
        "--prior",
        tiny_prior,
        "--json",
        tmp_path / "adapters.json",
        "--set",
        "federation.num_rounds=2",
        "federation.local_steps=1",
        "federation.num_views=2",
    ]
    monkeypatch.setattr(sys, "argv", ["adapters", *map(str, arguments)])
    monkeypatch.setattr(benchmark, "NUM_DRAWS", 2)
    assert benchmark.main() == 0
    figures = json.loads((tmp_path / "adapters.json").read_text())
    keys = [(row["adapter"], row["patients"], row["epsilon"], len(row["changes"])) for row in figures["loss"]]
    assert keys == [(r, n, e, d) for r in ("norm_affine", "lora") for n in (2, 3) for e, d in ((8, 2), (None, 1))]
    assert {row["share"] for row in figures["styles"]} == set(benchmark.SHARES)
    assert "loss of held-out patients" in capsys.readouterr().out


def test_wrong_numbers_are_one_line(tmp_path, monkeypatch, capsys):
    folders = ["--cases", str(tmp_path), "--held-out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["adapters", *folders, "--patients", "1"])
    assert benchmark.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
