"""A whole study over Flower's deployment engine, on this machine."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.server import cli as server_cli
from fedcmr.server.run_folder import load_run
from fedcmr.shared import checkpoint
from fedcmr.simulations.grid import make_grid, run_server_app
from tests.conftest import VENDORS, write_cases
from tests.deployment.conftest import change_site, server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def joined(deployed):
    """All sites online; they also answer studies without privacy, whose weights follow from the seed."""
    deployed.renew(allow_without_privacy=True)
    with deployed.joined(*deployed.sites):
        yield


def test_a_rehearsal_over_tls_charges_nothing_and_leaves_no_run_behind(deployed, joined, capfd):
    settings = ("--test", deployed.test, "--set", *deployed.settings)
    assert server("run", deployed.folder, "--rehearsal", *settings) == 0
    shown = capfd.readouterr().out
    assert "the study can start" in shown and re.search(r"│ c +│ yes +│ allowed +│ readable +│ allowed", shown)
    facts = json.loads((deployed.folder / "rehearsal.json").read_text())
    assert facts["connected"] == 3
    assert all(set(site["codes"].values()) == {"ok"} for site in facts["sites"].values())
    for folder in deployed.sites.values():
        assert Ledger(folder / "ledger").charges() == []
    assert not (deployed.folder / "rehearsal").exists(), "no copy of the test patients stays"
    assert not (deployed.folder / "runs").exists(), "the study's own run folder is not begun"
    assert server("run", deployed.folder, "--rehearsal", "--resume", *settings) == 2


def test_a_study_between_institutions_ends_with_its_report(deployed, joined, capfd):
    run = deployed.folder / "runs" / "default"
    assert server("run", deployed.folder, "--test", deployed.test, "--set", *deployed.settings) == 0
    shown = capfd.readouterr()
    assert server("status", deployed.folder, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert "round 2 of 2: 3 of 3 sites" in shown.err + (run / "log.txt").read_text()
    report = json.loads((run / "report.json").read_text())
    assert set(report["privacy"]["sites"]) == {"a", "b", "c"}
    assert report["regression"][deployed.test.name]["all"]["n_patients"] == 5
    assert facts["services"] == {"superlink": True, "superexec": True} and facts["healthy"]
    assert facts["sites"] == dict.fromkeys("abc", "online")
    assert facts["run"]["round"] == 2 and facts["run"]["answered"] == ["a", "b", "c"]
    _, metadata = checkpoint.load(run / "generator.safetensors")
    for name, folder in deployed.sites.items():
        assert len(Ledger(folder / "ledger").charges()) == len(metadata["sites"][name]["releases"]) == 2
        assert not list((folder / "flwr").rglob("*.npz")), "no scan is copied into Flower's folder"
    assert server_cli.main(["run", str(deployed.folder)]) == 2, "a finished run is not begun again by accident"
    assert re.search(r"--resume continues it", capfd.readouterr().err)


def test_without_privacy_the_weights_are_those_of_one_process_tree(deployed, joined, tmp_path):
    run, reference = tmp_path / "deployed", tmp_path / "reference"
    settings = (*deployed.settings, "privacy.enabled=false")
    assert server("run", deployed.folder, "--out", run, "--test", deployed.test, "--set", *settings) == 0
    reference.mkdir()
    for name in ("config.yaml", "study.json"):
        shutil.copy(run / name, reference / name)
    shutil.copytree(run / "test", reference / "test")
    (reference / "sites").mkdir()
    for name, folder in deployed.sites.items():
        (reference / "sites" / name).symlink_to(folder, target_is_directory=True)
    with make_grid(load_run(reference)) as grid:
        run_server_app(grid, {"run-dir": str(reference)})
    weights = [checkpoint.load(folder / "generator.safetensors")[0] for folder in (run, reference)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name], err_msg=name)
    codes = [
        [
            (line["answered"], line["refused"], line["dropped"])
            for line in load_run(folder).metrics()
            if "answered" in line
        ]
        for folder in (run, reference)
    ]
    assert codes[0] == codes[1] == [(["a", "b", "c"], {}, {})] * 2
    errors = [
        json.loads((folder / "report.json").read_text())["regression"][deployed.test.name]["all"]["mae_points"]
        for folder in (run, reference)
    ]
    assert errors[0] == pytest.approx(errors[1], abs=0.5)


def test_sites_judge_the_model_on_test_patients_that_never_leave(deployed, joined, tmp_path):
    """The real ResNet50 travels; one site answers in private, one with its table, one does not take part."""
    for seed, (name, form) in enumerate((("a", "private"), ("b", "table")), start=80):
        folder = deployed.sites[name]
        write_cases(folder / "test", VENDORS[name], 6, seed, prefix="t")
        policy = replace(load_site(folder).policy, evaluation=form)
        change_site(folder, test="test", policy=policy)
    run = tmp_path / "evaluated"
    settings = (*deployed.settings, "privacy.enabled=false", "evaluation.federated=true")
    assert server("run", deployed.folder, "--rehearsal", "--set", *settings) == 0
    rehearsed = json.loads((deployed.folder / "rehearsal.json").read_text())["evaluation"]["sites"]
    assert {name: (answer["code"], answer["form"]) for name, answer in rehearsed.items()} == {
        "a": ("ok", "private"),
        "b": ("ok", "table"),
        "c": ("no-evaluation", None),
    }
    assert rehearsed["a"]["seconds"] >= 20, "a whole step, as in the run"
    assert Ledger(deployed.sites["a"] / "test_ledger").charges() == []
    assert server("run", deployed.folder, "--out", run, "--set", *settings) == 0
    found = json.loads((run / "report.json").read_text())["federated_evaluation"]
    assert {name: (answer["code"], answer["form"]) for name, answer in found["sites"].items()} == {
        "a": ("ok", "private"),
        "b": ("ok", "table"),
        "c": ("no-evaluation", None),
    }
    assert found["vendors"]["Philips"]["n_patients"] == 6
    assert len(Ledger(deployed.sites["a"] / "test_ledger").charges()) == 1
    assert not (run / "test").exists(), "no scan of a test patient is here"
