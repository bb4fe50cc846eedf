"""A run that begins from another: what is taken over, what is done again, and what is refused by its name."""

import json

import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.server import cli as server_cli
from fedcmr.server.experiments.continuation import _depends_on, begin_from, differing
from fedcmr.server.run_folder import load_run
from fedcmr.server.settings import load
from fedcmr.server.study import STAGES
from fedcmr.shared.errors import UserError
from fedcmr.simulations import cli as simulate_cli
from fedcmr.simulations.run import _take_sites

DONE = (
    "hospitals",
    "prepare",
    "pooled_real",
    "local_only_a",
    "federation",
    "synthesis",
    "regressor",
    "segmentation/synthetic_only",
    "combined_ef",
    "predict_the_mean",
    "prior_only",
    "segmentation/prior_only",
    "matrix/synthetic/GE",
    "matrix/real/GE",
    "report",
)
MODELS = {
    "pooled_real": "checkpoints/pooled_real.safetensors",
    "regressor": "regressor.safetensors",
    "segmentation/synthetic_only": "segmentation.safetensors",
    "prior_only": "checkpoints/prior_only.safetensors",
    "segmentation/prior_only": "checkpoints/segmentation/prior_only.safetensors",
    "matrix/synthetic/GE": "checkpoints/matrix/synthetic/GE.safetensors",
    "matrix/real/GE": "checkpoints/matrix/real/GE.safetensors",
}
KEY = {"regressor": "synthetic_only"}


@pytest.fixture
def earlier(make_study, write_cases):
    """A finished run: its files, without their content."""
    run = make_study("tasks=[ejection_fraction,segmentation]")
    for stage in DONE:
        run.metric({"stage": stage, "done": True, "elapsed_s": 1.0})
    run.metric({"stage": "federation", "round": 1, "answered": ["a"]})
    for stage, path in MODELS.items():
        key = KEY.get(stage, stage)
        run.metric({"stage": "training", "model": key, "step": 1, "loss": 0.5})
        for file in (path, f"private/predictions/{key}.json"):
            (run.path / file).parent.mkdir(parents=True, exist_ok=True)
            (run.path / file).write_text(stage)
    others = (
        "checkpoints/round_0001.safetensors",
        "synthetic/cases.csv",
        "checkpoints/combined_ef.json",
        "report.json",
    )
    for file in (*others, "generator.safetensors", "private/predictions/local_only_a.json", "regressor.md"):
        (run.path / file).parent.mkdir(exist_ok=True)
        (run.path / file).write_text(file)
    (run.path / "private" / "predictions" / "predict_the_mean.json").write_text("{}")
    write_cases(run.path / "test" / "hospitals", "GE", 2, seed=9)
    return run


def changed(run, *overrides):
    return load(run.path / "config.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("evaluation.baselines=[prior_only,pooled_real]", set()),
        ("evaluation.num_bootstrap=200", set()),
        (
            "regression.num_steps=3",
            {"regressor", "combined_ef", "pooled_real", "prior_only", "matrix/synthetic/GE", "matrix/real/GE"}
            | {"local_only_a"},
        ),
        (
            "segmentation.num_steps=3",
            {"segmentation/synthetic_only", "segmentation/prior_only", "combined_ef", "local_only_a"},
        ),
        ("synthesis.num_cases=9", {*DONE} - {"hospitals", "prepare", "federation", "pooled_real", "matrix/real/GE"}),
        ("tasks=[ejection_fraction]", {"combined_ef", "local_only_a"}),
    ],
)
def test_what_depends_on_a_changed_setting_is_done_again_and_nothing_else(override, again, earlier, tmp_path):
    run = begin_from(earlier.path, tmp_path / "new", changed(earlier, override))
    assert set(run.stage_seconds()) == {*DONE} - {"report"} - again
    assert run.rounds() == earlier.rounds()
    trained = {line["model"] for line in run.metrics() if line["stage"] == "training"}
    assert trained == {KEY.get(stage, stage) for stage in MODELS if stage not in again}
    for stage, path in MODELS.items():
        assert (run.path / path).exists() == (stage not in again), path
    assert (run.path / "synthetic").exists() == ("synthesis" not in again)
    assert (run.path / "generator.safetensors").exists() and (run.path / "test" / "hospitals" / "cases.csv").exists()
    assert not (run.path / "report.json").exists()
    assert run.config == changed(earlier, override)
    assert "taken over: hospitals, prepare, " in (run.path / "log.txt").read_text()


def test_files_are_linked_and_the_records_are_the_runs_own(earlier, tmp_path):
    run = begin_from(earlier.path, tmp_path / "new", changed(earlier, "evaluation.num_bootstrap=200"))
    assert (run.path / "generator.safetensors").samefile(earlier.path / "generator.safetensors")
    before = (earlier.path / "metrics.jsonl").read_bytes()
    run.mark_done("report", 1.0)
    assert (earlier.path / "metrics.jsonl").read_bytes() == before
    again = begin_from(earlier.path, tmp_path / "new", changed(earlier, "evaluation.num_bootstrap=200"))
    assert again.is_done("report"), "the same command again resumes"


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "privacy.target_epsilon=3",
        "federation.num_rounds=4",
        "hospitals.num_train=9",
        "hospitals.nominal_patients={a: 3}",
        "prior=other.safetensors",
    ],
)
def test_a_setting_of_a_finished_stage_is_refused_by_its_name(override, earlier, tmp_path):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=rf"{key}[\w.]* is .* there and .* here"):
        begin_from(earlier.path, tmp_path / "new", changed(earlier, override))
    assert not (tmp_path / "new").exists()


def test_what_a_finished_stage_does_not_depend_on_may_differ(earlier):
    overrides = ("device=auto", "federation.num_processes=7", "pretrain.num_steps=3", "generator.kind=vae")
    known = [override for override in overrides if override != "generator.kind=vae"]
    assert differing(earlier.config, changed(earlier, *known)) == {}


def test_a_run_whose_rounds_are_not_finished_is_resumed_and_not_begun_from(make_study, tmp_path):
    run = make_study()
    run.mark_done("prepare", 1.0)
    with pytest.raises(UserError, match="federation is not finished"):
        begin_from(run.path, tmp_path / "new", run.config)
    with pytest.raises(UserError, match="not a run folder"):
        begin_from(tmp_path / "nowhere", tmp_path / "new", run.config)
    run.mark_done("federation", 1.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="new or empty folder"):
        begin_from(run.path, tmp_path / "full", run.config)


def test_every_stage_of_the_table_is_known():
    """A new stage is always done again until somebody says what it depends on."""
    unknown = {stage.name for stage in STAGES if not stage.has_parts and not _depends_on(stage.name)}
    assert unknown == {"federation", "federated_segmenter", "report"}


def test_simulated_sites_keep_their_cases_and_their_ledger(earlier, tmp_path):
    (earlier.path / "sites" / "a" / "test").mkdir()
    run = begin_from(earlier.path, tmp_path / "new", changed(earlier, "evaluation.num_bootstrap=200"), _take_sites)
    assert run.site_names() == earlier.site_names()
    for name in run.site_names():
        before, now = (load_site(folder.path / "sites" / name) for folder in (earlier, run))
        assert now.data_path.samefile(before.data_path) and now.policy == before.policy
        assert now.ledger_path.resolve() == before.ledger_path.resolve(), "the same patients have one ledger"
        assert Ledger(now.ledger_path)._log.replica.resolve() == Ledger(before.ledger_path)._log.replica.resolve()
    assert not list(tmp_path.glob("*.partial"))


def test_simulate_begins_from_a_run_with_its_settings_and_does_the_rest(earlier, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("fedcmr.simulations.run.run_server_app", lambda grid, settings: calls.append(settings))
    monkeypatch.setattr("fedcmr.simulations.summary.print_summary", lambda run: None)
    words = ["fedcmr-simulate", "--from", str(earlier.path)]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "new"), "synthesis.num_cases=9"])
    assert simulate_cli.main() == 0
    run = load_run(tmp_path / "new")
    assert run.config == changed(earlier, "synthesis.num_cases=9") and len(calls) == 1
    assert run.is_done("federation") and not run.is_done("synthesis")
    monkeypatch.setattr("sys.argv", words)
    assert simulate_cli.main() == 2
    assert "give its folder as --out" in capsys.readouterr().err


def test_the_coordinator_begins_from_a_run_without_a_new_round(earlier, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    assert server_cli.main(["init", str(folder), "--name", "s", "--address", "127.0.0.1"]) == 0
    monkeypatch.setattr("fedcmr.server.deployment.runs.require_services", lambda _: None)
    begun = []
    monkeypatch.setattr("fedcmr.server.deployment.runs._flower_run", lambda coordinator, run: begun.append(run.path))
    words = ["run", str(folder), "--from", str(earlier.path)]
    assert server_cli.main([*words, "--out", str(tmp_path / "new"), "synthesis.num_cases=9"]) == 2
    assert "has not come to its report" in capsys.readouterr().err, "as Flower did nothing here"
    assert begun == [tmp_path / "new"] and load_run(tmp_path / "new").config.synthesis.num_cases == 9
    assert json.loads((tmp_path / "new" / "study.json").read_text()).keys() == {"sites"}
    assert not (tmp_path / "new" / "sites").exists(), "the sites are elsewhere"
    assert server_cli.main(words) == 2 and "give --out" in capsys.readouterr().err
