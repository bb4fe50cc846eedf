"""A study trains, tests and reports every task that its settings name."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.server.experiments import models
from fedcmr.server.experiments.models import check_test_patients, stage_name, train_models
from fedcmr.server.run_folder import open_run
from fedcmr.server.settings import load
from fedcmr.server.study import STAGES, Study, seconds_of_stages
from fedcmr.server.tasks.registry import TASKS, task_of_model, tasks_of
from fedcmr.shared.case import load_cases, read_index, save_case, write_index
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.simulations.grid import make_grid, run_server_app
from fedcmr.simulations.run import simulate

BOTH = "tasks=[ejection_fraction,segmentation]"
SMALL = (
    "federation.num_rounds=2",
    "federation.adapter=norm_affine",
    "synthesis.num_cases=6",
    "synthesis.num_slices=3",
    "synthesis.num_steps=1",
    "regression.num_steps=1",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "segmentation.num_steps=2",
    "segmentation.batch_size=2",
    "evaluation.num_bootstrap=100",
    "evaluation.baselines=[predict_the_mean,prior_only]",
    "evaluation.cross_vendor=[synthetic]",
)


def give_test_patients(run, write_cases, num=6):
    folder = run.path / "test" / "hospitals"
    for seed, vendor in enumerate(("GE", "Siemens"), start=50):
        write_cases(folder / vendor, vendor, num, seed)
        (folder / vendor / "prepared.json").write_text(json.dumps({"provenance": SIMULATED_SCANS.as_json()}))


@pytest.mark.slow
def test_both_tasks_are_trained_tested_and_in_the_report(make_study, write_cases):
    run = make_study(*SMALL, BOTH)
    give_test_patients(run, write_cases)
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve())})

    assert task_of_model(run.path / "segmentation.safetensors") is TASKS["segmentation"]
    assert task_of_model(run.path / "regressor.safetensors") is TASKS["ejection_fraction"]
    report, page = json.loads((run.path / "report.json").read_text()), (run.path / "report.html").read_text()
    rows = {"GE", "Philips", "Siemens", "without GE", "without Philips", "without Siemens", "all"}
    assert (
        set(report["regression"]["hospitals"]) == set(report["segmentation"]["hospitals"]) == {"GE", "Siemens", "all"}
    )
    assert set(report["baselines"]) == {"predict_the_mean", "prior_only"}
    others = report["tasks"]["segmentation"]
    assert set(others["baselines"]) == {"prior_only"}
    assert set(others["matrix"]["synthetic"]) == set(report["matrix"]["synthetic"]) == rows
    combined = report["combined_ef"]
    assert 0 <= combined["weight"] <= 1 and combined["test_sets"]["hospitals"]["resnet50"]["all"]["n_patients"] == 12
    of_network = report["regression"]["hospitals"]["GE"]["mae_points"]
    assert combined["test_sets"]["hospitals"]["resnet50"]["GE"]["mae_points"] == of_network
    assert 'id="vendors"' in page and 'id="segmentation"' in page and "Segmentation across vendors" in page
    assert page.count("Training loss over steps") == 2

    # The figures are those of the saved networks on the test patients, by the task's own score.
    task, config = TASKS["segmentation"], run.config
    ((_, patients),) = models.test_sets(run, "segmentation")
    for path, shown in (
        (run.path / "segmentation.safetensors", report["segmentation"]["hospitals"]),
        (run.path / "checkpoints" / "segmentation" / "prior_only.safetensors", others["baselines"]["prior_only"]),
        (
            run.path / "checkpoints" / "segmentation" / "matrix" / "synthetic" / "GE.safetensors",
            others["matrix"]["synthetic"]["GE"],
        ),
    ):
        model = task.load(path)
        found = task.predict(model, patients, config, "cpu")
        expected = task.score(model, patients, found, [case.info.vendor for case in patients], config)["segmentation"]
        figures = shown.get("hospitals", shown)["all"]
        # The file's weights are rounded to float16, and so is the last digit of a border.
        assert figures["dice"]["mean"] == pytest.approx(expected["all"]["dice"]["mean"], abs=0.02)
        assert figures["n_patients"] == expected["all"]["n_patients"] == 12
    sections = {row["section"] for row in csv.DictReader((run.path / "report.csv").open())}
    assert {"segmentation", "segmentation matrix synthetic", "results", "matrix synthetic"} <= sections

    done = list(run.stage_seconds())
    assert "segmentation/synthetic_only" in done and "segmentation/matrix/synthetic/GE" in done
    assert list(report["timing"]["seconds_per_stage"]) == done[: done.index("report")]
    before = (run.path / "regressor.safetensors").stat().st_mtime_ns
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve())})
    assert (run.path / "regressor.safetensors").stat().st_mtime_ns == before


def test_stages_and_files_of_the_ejection_fraction_have_the_names_of_earlier_versions(make_study):
    run = make_study()
    assert stage_name("ejection_fraction", "synthetic_only") == "regressor"
    for model in ("prior_only", "pooled_real", "matrix/real/GE"):
        assert stage_name("ejection_fraction", model) == model
        assert stage_name("segmentation", model) == f"segmentation/{model}"
    assert models.model_path(run, "ejection_fraction", "prior_only") == run.path / "checkpoints/prior_only.safetensors"
    assert models.predictions_folder(run) == run.path / "private" / "predictions"
    assert list(tasks_of(run.config)) == ["ejection_fraction"], "no more than before, unless it is asked for"


def test_a_stage_of_a_task_is_done_once_and_the_cases_are_made_where_they_are_used(make_study, monkeypatch):
    run = make_study(BOTH)
    trained, made = [], []
    monkeypatch.setattr(models, "train_and_predict", lambda run, task, model, cases, real: trained.append(task))
    run.mark_done("regressor", 1)
    for _ in range(2):
        train_models(run, "synthetic_only", lambda: made.append(1) or [])
    assert trained == ["segmentation"] and made == [1]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("[ejection_fraction,motion]", "Expected tasks to name some of"),
        ("[segmentation]", "Expected tasks to hold ejection_fraction"),
        ("[ejection_fraction,ejection_fraction]", "Expected tasks to differ from each other"),
    ],
)
def test_a_task_that_there_is_not_is_one_line_before_anything_is_written(tasks, said, tmp_path, capsys):
    assert run_command(lambda: simulate(load("smoke", [f"tasks={tasks}"]), tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="Expected tasks"):
        Study(open_run(tmp_path / "another", load("smoke", [f"tasks={tasks}"])))


def test_patients_without_masks_test_the_ejection_fraction_alone(make_study, write_cases):
    run = make_study(BOTH)
    give_test_patients(run, write_cases)
    folder = run.path / "test" / "hospitals" / "GE"
    for case in load_cases(folder):
        save_case(folder, replace(case, masks=np.zeros_like(case.masks)))
    sizes = {name: [len(cases) for _, cases in models.test_sets(run, name)] for name in TASKS}
    assert sizes == {"ejection_fraction": [12], "segmentation": [6]}


def test_test_patients_are_looked_for_in_their_index_alone(make_study, write_cases):
    run = make_study()
    with pytest.raises(UserError, match="holds no test patients"):
        check_test_patients(run)
    give_test_patients(run, write_cases)
    for path in (run.path / "test").rglob("*.npz"):
        path.write_bytes(b"no scan")
    check_test_patients(run)
    for folder in (run.path / "test" / "hospitals").iterdir():
        write_index(folder, [replace(info, ef=float("nan")) for info in read_index(folder)])
    with pytest.raises(UserError, match="holds no test patients"):
        check_test_patients(run)


def test_the_stages_times_are_in_the_order_of_the_table(make_study):
    run = make_study(BOTH)
    order = [
        "prepare",
        "pooled_real",
        "federation",
        "synthesis",
        "regressor",
        "segmentation/synthetic_only",
        "prior_only",
        "segmentation/prior_only",
        "matrix/synthetic/GE",
        "segmentation/matrix/synthetic/GE",
        "report",
    ]
    for number, name in enumerate([*order[:2], *order[:1:-1]]):
        run.mark_done(name, number)
    found = seconds_of_stages(run, STAGES)
    assert [stage_of(name) for name in found] == [stage_of(name) for name in order] and set(found) == set(order)


def stage_of(name):
    return "regressor" if name.endswith("synthetic_only") else name.removeprefix("segmentation/")
