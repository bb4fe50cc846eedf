"""The table of stages: its order is a study's course, each stage is done once, and none before what it needs."""

import pytest

from fedcmr.server.experiments.models import stage_name
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.run_folder import open_run
from fedcmr.server.settings import load
from fedcmr.server.study import STAGES as SERVER_STAGES
from fedcmr.server.study import Stage, Study, run_stages
from fedcmr.shared.errors import UserError, run_command
from fedcmr.simulations.run import STAGES, simulate

NAMES_OF_0_1 = [
    "hospitals",
    "prepare",
    "federation",
    "synthesis",
    "regressor",
    "federated_evaluation",
    "predict_the_mean",
    "prior_only",
    "report",
]
"""As `metrics.jsonl` of earlier versions has them: with other names a run of then would be done again."""


@pytest.fixture
def study(tmp_path):
    return Study(open_run(tmp_path / "run", load("smoke")))


def noting(done, name, needs=(), **changes):
    return Stage(name, "for a test", lambda study: done.append(name), needs, **changes)


def test_a_run_of_an_earlier_version_finds_its_stages_by_name_and_in_order():
    names = [stage.name for stage in STAGES]
    assert [name for name in names if name in NAMES_OF_0_1] == NAMES_OF_0_1
    assert {stage.name for stage in STAGES if not stage.has_parts} == {
        *set(NAMES_OF_0_1) - {"regressor", "prior_only"},
        "combined_ef",
        "federated_segmenter",
        "fidelity",
    }
    assert stage_name("ejection_fraction", MAIN_MODEL) == "regressor"
    assert stage_name("ejection_fraction", "prior_only") == "prior_only"
    assert STAGES[-len(SERVER_STAGES) :] == SERVER_STAGES


def test_every_stage_needs_only_what_stands_above_it():
    above: set[str] = set()
    for stage in STAGES:
        assert set(stage.needs) <= above and stage.name not in above and stage.what
        above.add(stage.name)


def test_a_stage_is_done_once_and_the_next_call_resumes(study):
    done: list[str] = []
    stages = [noting(done, "one"), noting(done, "two", ("one",)), noting(done, "three", ("two",))]
    assert run_stages(study, stages, until="two") and done == ["one", "two"]
    assert not run_stages(study, stages) and done == ["one", "two", "three"]
    assert list(study.run.stage_seconds()) == ["one", "two", "three"]


def test_a_stage_that_no_setting_wants_is_left_out_and_nobody_waits_for_it(study):
    done: list[str] = []
    stages = [noting(done, "one", wanted=lambda config: False), noting(done, "two", ("one",))]
    run_stages(study, stages)
    assert done == ["two"] and list(study.run.stage_seconds()) == ["two"]


def test_a_group_of_stages_is_not_noted_itself(study):
    done: list[str] = []
    run_stages(study, [noting(done, "group", has_parts=True), noting(done, "after", ("group",))])
    assert done == ["group", "after"] and list(study.run.stage_seconds()) == ["after"]


def test_a_stage_before_what_it_needs_is_a_line(study):
    done: list[str] = []
    with pytest.raises(UserError, match="two needs one, which is not done"):
        run_stages(study, [noting(done, "two", ("one",)), noting(done, "one")])
    assert done == []


def test_a_stage_that_fails_is_not_noted(study):
    def fail(study):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(study, [Stage("one", "fails", fail)])
    assert not study.run.is_done("one")


def test_until_an_unknown_stage_is_one_line_that_names_them_all(tmp_path, capsys):
    assert run_command(lambda: simulate(load("smoke"), tmp_path / "run", until="breakfast")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "breakfast" in error and all(name in error for name in NAMES_OF_0_1)
    assert not (tmp_path / "run").exists()
