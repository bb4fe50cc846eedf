"""The vendor benchmark: the classifier learns a visible style, and its figures are those of the definition."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.shared.case import load_cases, save_case, write_index
from fedcmr.simulations.benchmarks.vendors import main, recognise, recognition, train_network

pytestmark = pytest.mark.slow


@pytest.fixture
def styled(tmp_path, write_cases):
    """Cases of two vendors, of which one's images are darker."""

    def make(seed: int) -> list:
        cases = []
        for vendor, gain in (("GE", 1.0), ("Philips", 0.5)):
            folder = tmp_path / f"{vendor}{seed}"
            write_cases(folder, vendor, 6, seed)
            cases += [replace(case, frames=case.frames * np.float32(gain)) for case in load_cases(folder)]
        return cases

    return make


def test_the_network_recognises_a_visible_style_in_other_patients(styled):
    vendors = ["GE", "Philips"]
    network = train_network(styled(1), vendors, num_steps=30, seed=0)
    held_out = styled(2)
    assert recognition(recognise(network, held_out), held_out, vendors)["accuracy"] == 1
    dark = [replace(case, frames=case.frames * np.float32(0.5)) for case in held_out if case.info.vendor == "GE"]
    assert (recognise(network, dark) == 1).all()


def test_on_the_heart_alone_nothing_around_it_is_seen(styled):
    vendors = ["GE", "Philips"]
    cases = styled(1)
    network = train_network(cases, vendors, num_steps=60, seed=0, heart_only=True)
    assert recognition(recognise(network, cases, heart_only=True), cases, vendors)["accuracy"] > 0.9
    # Bright surroundings, as the other vendor has them, change nothing.
    strange = [replace(case, frames=np.where(case.masks > 0, case.frames, np.float32(1))) for case in cases]
    same = recognise(network, cases, heart_only=True) == recognise(network, strange, heart_only=True)
    assert same.all() and not (recognise(network, cases) == recognise(network, strange)).all()


def test_accuracy_interval_and_confusion(styled):
    cases = styled(1)[:10]  # 6 of GE, 4 of Philips
    values = recognition(np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 0]), cases, ["GE", "Philips"])
    assert values["accuracy"] == 0.8 and values["n_patients"] == 10
    assert values["ci95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson, 8 of 10
    assert values["confusion"] == {"GE": {"GE": 5, "Philips": 1}, "Philips": {"GE": 1, "Philips": 3}}


def test_the_command_reads_a_study_folder(make_study, write_cases, tmp_path, monkeypatch, capsys):
    run = make_study()
    for place in ("test/hospitals/a", "synthetic"):
        cases = []
        for seed, vendor in enumerate(("Siemens", "Philips", "GE")):
            write_cases(tmp_path / "made" / vendor, vendor, 2, seed + 40)
            found = load_cases(tmp_path / "made" / vendor)
            cases += [replace(c, info=replace(c.info, pseudonym=f"{vendor}-{c.info.pseudonym}")) for c in found]
        for case in cases:
            save_case(run.path / place, case)
        write_index(run.path / place, [case.info for case in cases])
    out = tmp_path / "v.json"
    monkeypatch.setattr("sys.argv", ["vendors", str(run.path), "--steps", "2", "--json", str(out)])
    assert main() == 0
    figures = json.loads(out.read_text())
    assert figures["vendors"] == ["GE", "Philips", "Siemens"]
    for model in ("network on images", "network on the heart alone", "logistic regression on style vectors"):
        answers = figures[model]
        assert {name: values["n_patients"] for name, values in answers.items()} == {
            "training scans": 15,
            "held-out scans": 6,
            "synthetic": 6,
        }
    assert "taken for GE" in capsys.readouterr().out


def test_a_study_of_one_vendor_is_refused(make_study, monkeypatch, capsys):
    run = make_study()
    for name in ("a", "b"):
        (run.path / "sites" / name / "site.yaml").unlink()
    monkeypatch.setattr("sys.argv", ["vendors", str(run.path)])
    assert main() == 2
    assert "two vendors or more" in capsys.readouterr().err
