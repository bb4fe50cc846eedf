"""What a simulated study takes from its settings, and what it never takes from its cases."""

import json

import pytest

from fedcmr.server.settings import load
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.simulations.run import nominal_patients, simulate


def settings(*overrides: str):
    return load("default", ["hospitals.source=prepared", "data_root=scans", *overrides]).hospitals


@pytest.fixture
def root(tmp_path, write_cases):
    for name, vendor in (("a", "GE"), ("b", "Philips")):
        write_cases(tmp_path / "root" / name / "train", vendor, 3, seed=1)
    record = json.dumps({"provenance": SIMULATED_SCANS.as_json()})
    (tmp_path / "root" / "b" / "train" / "prepared.json").write_text(record)
    return tmp_path / "root"


def test_the_public_number_of_patients_is_the_settings_and_not_the_count_of_cases(root, tmp_path, tiny_prior):
    config = load(
        "default",
        [
            "hospitals.source=prepared",
            f"data_root={root}",
            "hospitals.nominal_patients={a: 12, b: 7}",
            f"prior={tiny_prior}",
        ],
    )
    run = simulate(config, tmp_path / "run", until="prepare")
    sites = json.loads((run.path / "study.json").read_text())["sites"]
    assert [sites[name]["nominal_patients"] for name in "ab"] == [12, 7]
    assert sites["a"]["vendors"] == {"GE": 12}
    assert [sites[name]["provenance"]["kind"] for name in "ab"] == ["private", "simulated"]
    for name, number in (("a", 12), ("b", 7)):
        assert f"nominal_patients: {number}" in (run.path / "sites" / name / "site.yaml").read_text()


def test_acdc_takes_the_published_splits_size():
    assert load("acdc", ["data_root=scans"]).hospitals.nominal_patients == 20


def test_a_site_of_several_vendors_needs_a_number_for_each():
    two = settings("hospitals.nominal_patients={a: {GE: 30, Siemens: 12}}")
    assert nominal_patients(two, "a", ["GE", "Siemens"]) == {"GE": 30, "Siemens": 12}
    with pytest.raises(UserError, match="expected a number for each of GE, got GE, Siemens"):
        nominal_patients(two, "a", ["GE"])
    with pytest.raises(UserError, match="names no number for site b"):
        nominal_patients(two, "b", ["GE"])
    with pytest.raises(UserError, match="several vendors"):
        nominal_patients(settings("hospitals.nominal_patients=9"), "a", ["GE", "Siemens"])
