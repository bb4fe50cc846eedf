"""The benchmark of the segmenter's rounds: a study's own rounds and plan, rows against the public segmenter."""

import json

import numpy as np
import pytest
import torch

from fedcmr.client.segmenter_training import segmenter_learner
from fedcmr.client.training import Execution, LocalSteps, private_steps
from fedcmr.server.federation.state import initial_state, make_request
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter
from fedcmr.simulations.benchmarks.federated_segmenter import federate, load_hospital, main, with_target

CPU = torch.device("cpu")
SMALL = ["federation.segmenter_rounds=1", "federation.local_steps=1", "federation.num_views=1", "device=cpu"]


@pytest.fixture
def folders(tmp_path, write_cases):
    for seed, name in enumerate(("a", "b", "test")):
        write_cases(tmp_path / name, "GE", 3, seed=seed)
    return tmp_path


def test_rows_stand_against_the_public_segmenter(folders, capsys):
    sites = [word for name in "ab" for word in ("--site", name, str(folders / name))]
    more = ["--test", str(folders / "test"), "--json", str(folders / "out.json"), *SMALL]
    assert main([*sites, *more]) == 0
    facts = json.loads((folders / "out.json").read_text())
    public, private, plain = facts["rows"]
    assert [row["name"] for row in (private, plain)] == [
        "tuned at the sites, epsilon 8",
        "tuned at the sites, without noise",
    ]
    assert public["test"]["test"]["difference"]["difference_points"] == 0
    assert private["noise_multiplier"] > 0 == plain["noise_multiplier"] and facts["hospitals"] == {"a": 3, "b": 3}
    for row in (private, plain):
        figures = row["test"]["test"]
        points = 100 * (figures["dice"]["mean"] - public["test"]["test"]["dice"]["mean"])
        assert figures["difference"]["difference_points"] == pytest.approx(points, abs=1e-9)
    assert "tuned at the sites, without noise" in capsys.readouterr().out


def test_without_noise_a_round_adds_the_mean_of_the_sites_own_steps(folders):
    hospitals = {name: load_hospital(folders / name) for name in "ab"}
    config = with_target(SMALL, np.inf)
    state = federate(hospitals, config, CPU)
    facts = {name: site for name, (site, _) in hospitals.items()}
    before = initial_state(config, load_prior(), facts)
    request = make_request(config, before, before.num_rounds(config), facts)
    assert request.task == "segmenter"
    learner = segmenter_learner(load_segmenter())
    updates = [
        private_steps(
            learner, patients, before.segmenter, request.mechanism.at(3), LocalSteps.of(request), Execution(CPU)
        )
        for _, patients in hospitals.values()
    ]
    for name, array in before.segmenter.items():
        expected = array + (updates[0][name] + updates[1][name]) / 2
        np.testing.assert_allclose(state.segmenter[name], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "a", "a", "--site", "a", "b", "--test", "test"], "each name once"),
        (["--site", "a", "a", "--test", "test", "--epsilons", "0"], "--epsilons > 0"),
    ],
)
def test_bad_input_is_one_line(folders, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folders)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
