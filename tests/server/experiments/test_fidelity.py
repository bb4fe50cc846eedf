"""The study's synthetic hearts against its test patients: who is compared, what is kept, and what may be published."""

import json
import stat
from functools import partial

import pytest

from fedcmr.server.evaluation.fidelity.measure import TOO_FEW, Effort
from fedcmr.server.experiments import fidelity
from fedcmr.server.experiments.continuation import _depends_on, _files
from fedcmr.server.study import STAGES, Study
from fedcmr.shared.provenance import SIMULATED_SCANS

PATIENTS = {"Siemens": 9, "Philips": 5}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fidelity, "Effort", partial(Effort, num_steps=1, num_draws=2))
    monkeypatch.setattr(fidelity, "NUM_PRIOR_ONLY", 8)


@pytest.fixture
def study(make_study, write_cases):
    """A study with a synthetic set and test patients of two vendors, of whom one has too few."""
    run = make_study("evaluation.fidelity=true", "synthesis.num_slices=3", "synthesis.num_steps=1")
    write_cases(run.path / "synthetic", "Siemens", 9, seed=8)
    for seed, (vendor, num) in enumerate(PATIENTS.items()):
        write_cases(run.path / "test" / "hospitals" / vendor, vendor, num, seed=20 + seed, prefix=vendor[:2])
    return run


def measured(run):
    stage = next(stage for stage in STAGES if stage.name == fidelity.STAGE)
    assert stage.wanted(run.config)
    stage.do(Study(run))
    return json.loads((run.path / fidelity.PATH).read_text())


@pytest.mark.slow
def test_the_figures_are_kept_for_this_account_and_published_rounded(study):
    found = measured(study)
    path = study.path / fidelity.PATH
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert found["test_sets"] == ["hospitals"] and not found["simulated"]
    assert found["not_measured"] == {"Philips": TOO_FEW} and list(found["groups"]) == ["Siemens"]
    group = found["groups"]["Siemens"]
    assert set(group["comparisons"]) == {"own", "halves", "prior_only"} and group["n_prior_only"] == 8
    block = fidelity.fidelity_block(study)["fidelity"]["groups"]["Siemens"]
    for metric, digits in (("frd", 1), ("auc_heart", 2), ("wasserstein_lv_ed_ml", 1)):
        value = group["comparisons"]["own"][metric]
        assert block["comparisons"]["own"][metric] == round(value, digits)
    mean = group["anatomy"]["real"]["lv_ed_ml_mean"]
    assert block["anatomy"]["real"]["lv_ed_ml_mean"] == round(mean, 1) != mean
    assert "Philips" not in block


@pytest.mark.slow
def test_simulated_patients_are_left_out_where_there_are_real_ones(study, write_cases):
    folder = study.path / "test" / "simulated"
    write_cases(folder, "Siemens", 9, seed=40)
    (folder / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    study.config.evaluation.baselines = []
    found = measured(study)
    assert found["test_sets"] == ["hospitals"] and found["groups"]["Siemens"]["n_patients"] == 9
    assert found["groups"]["Siemens"]["n_prior_only"] is None
    for index in (study.path / "test" / "hospitals").rglob("cases.csv"):
        (index.parent / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))
    both = measured(study)
    assert both["test_sets"] == ["hospitals", "simulated"] and both["simulated"]
    assert both["groups"]["Siemens"]["n_patients"] == 18
    value = both["groups"]["Siemens"]["comparisons"]["own"]["frd"]
    assert fidelity.fidelity_block(study)["fidelity"]["groups"]["Siemens"]["comparisons"]["own"]["frd"] == value


def test_patients_who_stay_at_their_site_are_compared_with_nothing(study):
    for index in (study.path / "test").rglob("cases.csv"):
        index.unlink()
    study.config.evaluation.federated = True
    found = measured(study)
    assert found["test_sets"] == [] and found["groups"] == {}


def test_a_new_run_takes_the_figures_over_unless_what_they_depend_on_differs(study):
    (study.path / "private").mkdir()
    (study.path / fidelity.PATH).write_text("{}")
    assert study.path / fidelity.PATH in _files(study, {fidelity.STAGE})
    assert study.path / fidelity.PATH not in _files(study, set())
    assert "synthesis" in _depends_on(fidelity.STAGE) and "evaluation.baselines" in _depends_on(fidelity.STAGE)
