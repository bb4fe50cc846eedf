"""The scale benchmark: sites share cases and nothing else, and what is measured is of a whole study."""

import json

import pytest

from fedcmr.client.policy import load_site
from fedcmr.server.run_folder import load_run
from fedcmr.simulations.benchmarks.scale import main, measure, write_study

pytestmark = pytest.mark.engine


def test_sites_share_cases_and_have_ledgers_of_their_own(tmp_path, write_cases):
    write_cases(tmp_path / "cases", "GE", 2, seed=1)
    run = load_run(write_study(tmp_path / "run", tmp_path / "cases", 12))
    sites = [load_site(run.path / "sites" / name) for name in run.site_names()]
    assert len(sites) == 12 == len(json.loads((run.path / "study.json").read_text())["sites"])
    assert {site.data_path for site in sites} == {tmp_path / "cases"}
    assert len({site.ledger_path for site in sites}) == 12


def test_a_study_is_measured_to_its_end(tmp_path, write_cases):
    pytest.importorskip("ray", reason="flwr[simulation] is not installed")
    write_cases(tmp_path / "cases", "GE", 2, seed=1)
    figures = measure(tmp_path / "study", tmp_path / "cases", 3)
    assert figures.sites == 3 and figures.round_s > 0
    assert 50 < figures.server_mib < figures.all_mib, "the ServerApp's process is one of all"
    assert 0 < figures.bytes_per_site < 1_000_000


@pytest.mark.parametrize("sites", ["", "0,3", "three"])
def test_numbers_that_are_none_are_refused(sites, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scale", "--sites", sites])
    assert main() == 2
    assert "whole numbers from 1" in capsys.readouterr().err
