"""The study's models: of every task, trained on cases, tested on the test patients, what was predicted kept."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fedcmr.server.experiments.names import MAIN_MODEL, model_rank
from fedcmr.server.run_folder import REGRESSOR_NAME, RunFolder
from fedcmr.server.settings import MAIN_TASK, Config
from fedcmr.server.tasks.base import Task
from fedcmr.server.tasks.registry import TASKS, tasks_of
from fedcmr.shared.case import INDEX_NAME, Case, load_cases, read_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.provenance import Provenance, of_folder, together

TestSets = list[tuple[str, list[Case]]]
"""Held-out patients by the name of their set."""
OF_SYNTHETIC = """Synthetic patients only. What they owe to patients at the sites is bounded by the privacy of the study
that made them; the data set's datasheet gives it."""
OF_SITES = """The sites' own scans, pooled, without privacy: the weights may disclose whoever was scanned. They are a
baseline for the machine that made them."""
REGRESSOR_STAGE = "regressor"
"""The stage in which the main task's main model is trained."""


def train_models(run: RunFolder, model_name: str, make_cases: Callable[[], Sequence[Case]], real: bool = False) -> None:
    """Train a network of each of the study's tasks on the same cases; each is a stage of the run.

    Args:
        run: The run.
        model_name: As for `train_and_predict`.
        make_cases: Returns what to train on; called once, where there is anything to do.
        real: Whether these are the sites' own scans.
    """
    cases = cache(make_cases)
    for task_name in tasks_of(run.config):
        with run.stage(stage_name(task_name, model_name)) as to_do:
            if to_do:
                train_and_predict(run, task_name, model_name, cases(), real)


def train_and_predict(
    run: RunFolder, task_name: str, model_name: str, cases: Sequence[Case], real: bool = False
) -> None:
    """Train a task's network and keep its weights, its training curve and what it predicts on every test set.

    Args:
        run: The run.
        task_name: One of `TASKS`.
        model_name: Names the files; may hold slashes.
        cases: What to train on; those that are not labelled for the task are left out.
        real: Whether these are the sites' own scans.

    Raises:
        UserError: No case is labelled, or the loss is not finite.
    """
    task, config, device = TASKS[task_name], run.config, pick_device(run.config.device)
    key = model_key(task_name, model_name)
    curve: list[tuple[int, float]] = []
    prefix = "regressor" if task_name == MAIN_TASK else task_name
    model = task.train(
        cases,
        config,
        device,
        checkpoint=run.path / "checkpoints" / f"{prefix}_{model_name.replace('/', '_')}.safetensors",
        description=f"training {key}",
        log=lambda step, loss: curve.append((step, loss)),
    )
    path = model_path(run, task_name, model_name)
    private_folder(path.parent)
    task.save(path, model, cases, config, OF_SITES if real else OF_SYNTHETIC)
    for step, loss in curve:
        run.metric({"stage": "training", "model": key, "step": step, "loss": round(loss, 6)})
    held_out = test_sets(run, task_name)
    values = {
        name: task.per_patient(patients, task.predict(model, patients, config, device)) for name, patients in held_out
    }
    save_predictions(run, key, held_out, values)


def model_key(task_name: str, model_name: str) -> str:
    """A model's name among those of all tasks: the main task's have their own, the others begin with their task's."""
    return model_name if task_name == MAIN_TASK else f"{task_name}/{model_name}"


def stage_name(task_name: str, model_name: str) -> str:
    """The stage of the run in which a model is trained."""
    return REGRESSOR_STAGE if (task_name, model_name) == (MAIN_TASK, MAIN_MODEL) else model_key(task_name, model_name)


def main_stage_of(stage: str) -> str:
    """The stage in which the main task's model of the same name is trained; a stage that trains none is its own."""
    task_name, _, model_name = stage.partition("/")
    return stage_name(MAIN_TASK, model_name) if task_name in TASKS else stage


def model_path(run: RunFolder, task_name: str, model_name: str) -> Path:
    """The weights' file: the main models lie in the run folder itself, as `regressor` or under their task's name."""
    if model_name == MAIN_MODEL:
        return run.path / (REGRESSOR_NAME if task_name == MAIN_TASK else f"{task_name}.safetensors")
    return run.path / "checkpoints" / f"{model_key(task_name, model_name)}.safetensors"


def save_predictions(
    run: RunFolder, key: str, held_out: TestSets, values: Mapping[str, Mapping[str, Sequence[Any]]]
) -> None:
    """Write `private/predictions/<key>.json`, for this account alone.

    Per test set it holds the vendors, and what the task's figures are computed from: of the main task the true and
    predicted ejection fractions, and the SD of the latter.

    Args:
        run: The run.
        key: See `model_key`; its slashes are folders below `private/predictions`.
        held_out: The patients.
        values: {test set: what the task's `per_patient` returned}.
    """
    rows = {name: {"vendors": [case.info.vendor for case in cases], **values[name]} for name, cases in held_out}
    path = predictions_folder(run) / f"{key}.json"
    private_folder(path.parent)
    write_atomically(path, json.dumps(rows, indent=1).encode())


def read_predictions(run: RunFolder, task_name: str = MAIN_TASK) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {test set: its vendors, and what the task's `per_patient` returned}}, in the reader's order of models."""
    paths = sorted(predictions_folder(run, task_name).glob("*.json"), key=lambda path: model_rank(path.stem))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def table_of(task: Task[Any, Any, Any], rows: Mapping[str, Sequence[Any]], config: Config) -> Mapping[str, Any]:
    """A task's figures of one test set of `save_predictions`, vendor by vendor."""
    values = {name: column for name, column in rows.items() if name != "vendors"}
    return task.table(values, rows["vendors"], config)


def predictions_folder(run: RunFolder, task_name: str = MAIN_TASK) -> Path:
    """Where what a task's models predict of single patients lies, apart from the report that may be shared."""
    folder = run.path / "private" / "predictions"
    return folder if task_name == MAIN_TASK else folder / task_name


def test_sets(run: RunFolder, task_name: str = MAIN_TASK) -> TestSets:
    """Every held-out set by name: the cases of all folders below `test/<name>` that are labelled for a task.

    For the main task these are the cases whose index gives an ejection fraction that no program found.

    Raises:
        UserError: There is no test patient, and the sites do not evaluate on theirs either.
    """
    check_test_patients(run)
    sets = []
    for name, folders in _test_folders(run).items():
        cases = [case for folder in folders for case in load_cases(folder)]
        if task_name == MAIN_TASK:
            known = [case for case in cases if math.isfinite(case.info.ef)]
        else:
            known = [case for case in cases if TASKS[task_name].is_labelled(case)]
        if known:
            sets.append((name, known))
    return sets


def check_test_patients(run: RunFolder) -> None:
    """Look for a test patient of a known ejection fraction in the indices alone, without reading any scan.

    Raises:
        UserError: There is none, and the sites do not evaluate on theirs either.
    """
    if run.config.evaluation.federated:
        return
    indices = (read_index(folder) for folders in _test_folders(run).values() for folder in folders)
    if not any(info.ef == info.ef for rows in indices for info in rows):
        raise UserError(f"{run.path / 'test'} holds no test patients: run 'fedcmr-simulate --until prepare' first")


def test_provenances(run: RunFolder, names: Iterable[str]) -> dict[str, Provenance]:
    """Where the patients of every test set come from: of all prepared folders below `test/<name>` together."""
    folders = {name: [index.parent for index in (run.path / "test" / name).rglob(INDEX_NAME)] for name in names}
    return {name: together(map(of_folder, paths)) for name, paths in folders.items()}


def _test_folders(run: RunFolder) -> dict[str, list[Path]]:
    """Test set -> its folders of prepared cases."""
    sets = sorted(path for path in (run.path / "test").glob("*") if path.is_dir())
    return {folder.name: [index.parent for index in sorted(folder.rglob(INDEX_NAME))] for folder in sets}
