"""A new run that takes over an earlier one's finished stages, where only settings of later stages differ.

The sites' rounds are the dear part of a study: they cost patients' privacy, and hours. What comes after them costs
neither, so that another data set, regressor or baseline needs a run folder of its own but no new rounds.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedcmr.server.experiments import combined_ef, fidelity
from fedcmr.server.experiments.models import REGRESSOR_STAGE, model_path, predictions_folder, stage_name
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.federation import evaluation, senders
from fedcmr.server.federation.state import FEDERATED_SEGMENTER_NAME, STUDY_NAME
from fedcmr.server.run_folder import CONFIG_NAME, METRICS_NAME, RunFolder, load_run
from fedcmr.server.settings import MAIN_TASK, Config, dump
from fedcmr.server.tasks.registry import TASKS
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError

FIRST_STAGES = ("hospitals", "prepare", "federation")
"""Always taken over: what they depend on may not differ."""
LATER = ("tasks", "synthesis", "regression", "segmentation", "evaluation")
"""Settings, and blocks of them, on which only later stages depend."""
NO_MATTER = ("device", "generator", "pretrain", "federation.num_processes", "federation.reply_timeout_s")
"""Settings on which nothing depends that a finished stage left behind: where and how fast it worked, and what only
`fedcmr-server pretrain` reads."""
NO_MODEL: Mapping[str, tuple[str, ...]] = {
    "synthesis": ("synthesis",),
    combined_ef.STAGE: ("tasks", "synthesis", "regression", "segmentation"),
    evaluation.STAGE: ("synthesis", "regression", "evaluation.federated_epsilon"),
    "predict_the_mean": ("synthesis",),
    fidelity.STAGE: ("synthesis", "evaluation.baselines", "evaluation.num_bootstrap"),
}
"""Stages that train no model, and the later settings that they depend on."""
WITHOUT_SYNTHESIS = ("pooled_real", "matrix/real/")
"""Beginnings of the names of models that learn from real cases alone."""
STUDIES = ("federated_without_privacy", "epsilon_", "local_only_", "without_")
"""Beginnings of the names of baselines that are studies of their own, with everything that a study has."""


def begin_from(
    earlier: Path, out: Path, config: Config, bring_sites: Callable[[RunFolder, Path], None] | None = None
) -> RunFolder:
    """Make a run folder that begins with what an earlier run has finished, or open it where that was done.

    Files are linked where the disk can, because neither run changes a finished one. Nothing is taken of stages whose
    settings differ, nor the report.

    Args:
        earlier: The earlier run's folder; its federation is finished.
        out: The new run's.
        config: The new run's settings.
        bring_sites: Gives the new folder the earlier run's sites, where they are simulated: called with the earlier run
            and a folder that will take the place of `out`, and lies next to it.

    Raises:
        UserError: The earlier run is none, or its federation is not finished; a setting of a finished stage differs; or
            `out` holds something else.
    """
    source = load_run(earlier)
    if not source.is_done("federation"):
        raise UserError(f"--from {earlier}: its federation is not finished: the command that began it resumes it")
    different = differing(source.config, config)
    for key, (before, now) in different.items():
        if not _is_of(key, LATER):
            raise UserError(
                f"--from {earlier}: {key} is {before!r} there and {now!r} here, and its finished stages depend on it: "
                "leave it as it was, or begin without --from"
            )
    if (out / CONFIG_NAME).is_file():
        return load_run(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a run folder: give a new or empty folder as --out")
    done = {stage for stage in source.stage_seconds() if _is_kept(stage, different)}
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():  # of an interruption
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for path in _files(source, done):
        _link(path, source.path, partial)
    lines = [line for line in source.metrics() if _line_is_kept(line, done)]
    write_atomically(partial / METRICS_NAME, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write_atomically(partial / CONFIG_NAME, dump(config).encode())
    if bring_sites is not None:
        bring_sites(source, partial)  # relative paths from there are those from `out`, its neighbour
    if out.exists():
        out.rmdir()
    partial.rename(out)
    run = load_run(out)
    taken = ", ".join(stage for stage in source.stage_seconds() if stage in done)
    run.log(f"begun from {source.path}, taken over: {taken}")
    return run


def differing(earlier: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and matter, by their full names: as they were, and as they are."""
    before, after = (dict(_leaves(OmegaConf.to_container(OmegaConf.structured(config)))) for config in (earlier, now))
    return {
        key: (before.get(key), after.get(key))
        for key in (*after, *(key for key in before if key not in after))
        if before.get(key) != after.get(key) and not _is_of(key, NO_MATTER)
    }


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values


def _is_of(key: str, settings: tuple[str, ...]) -> bool:
    """Whether a setting is one of these, or in one of these blocks."""
    return any(key == setting or key.startswith(f"{setting}.") for setting in settings)


def _is_kept(stage: str, different: Mapping[str, Any]) -> bool:
    """Whether a finished stage would come out the same."""
    if stage in FIRST_STAGES:
        return True
    needed = _depends_on(stage)
    return bool(needed) and not any(_is_of(key, needed) for key in different)


def _depends_on(stage: str) -> tuple[str, ...]:
    """The later settings that a stage depends on; empty for one that is always done again, such as the report."""
    if stage in NO_MODEL:
        return NO_MODEL[stage]
    found = _model_of(stage)
    if found is None:
        return ()
    task_name, model = found
    if model.startswith(STUDIES):
        return ("tasks", "synthesis", "regression", "segmentation")
    of_task = "regression" if task_name == MAIN_TASK else task_name
    return (of_task,) if model.startswith(WITHOUT_SYNTHESIS) else ("synthesis", of_task)


def _model_of(stage: str) -> tuple[str, str] | None:
    """The task and the model that a stage trains; None for one that trains none."""
    if stage == REGRESSOR_STAGE:
        return MAIN_TASK, MAIN_MODEL
    task_name, _, model = stage.partition("/")
    if task_name in TASKS and task_name != MAIN_TASK:
        return task_name, model
    known = ("prior_only", "matrix/synthetic/", *WITHOUT_SYNTHESIS, *STUDIES)
    return (MAIN_TASK, stage) if stage.startswith(known) else None


def _files(run: RunFolder, done: set[str]) -> Iterator[Path]:
    """What the finished stages that are taken over have left in the folder."""
    folder = run.path
    names = [STUDY_NAME, senders.FILE_NAME, "generator.safetensors", FEDERATED_SEGMENTER_NAME]
    found = [folder / name for name in names]
    found += [*(folder / "checkpoints").glob("round_*.safetensors"), *(folder / "test").rglob("*")]
    if "synthesis" in done:
        found += (folder / "synthetic").rglob("*")
    if combined_ef.STAGE in done:
        found.append(folder / "checkpoints" / "combined_ef.json")
    if evaluation.STAGE in done:
        found.append(folder / evaluation.FILE_NAME)
    if fidelity.STAGE in done:
        found.append(folder / fidelity.PATH)
    if "predict_the_mean" in done:
        found.append(predictions_folder(run) / "predict_the_mean.json")
    for stage in done:
        model = _model_of(stage)
        if model is None:
            continue
        weights = model_path(run, *model)
        found += [weights, weights.with_suffix(".md"), weights.with_suffix(".json")]
        # A study of its own gives every task's predictions.
        tasks = TASKS if model[1].startswith(STUDIES) else model[:1]
        found += [predictions_folder(run, task_name) / f"{model[1]}.json" for task_name in tasks]
    return (path for path in found if path.is_file())


def _line_is_kept(line: Mapping[str, Any], done: set[str]) -> bool:
    """Whether a line of `metrics.jsonl` belongs to a stage that is taken over."""
    if line.get("stage") == "training":
        task_name, _, model = str(line["model"]).partition("/")
        own = (task_name, model) if task_name in TASKS and task_name != MAIN_TASK else (MAIN_TASK, str(line["model"]))
        return stage_name(*own) in done
    return line.get("stage") in done


def _link(path: Path, source: Path, target: Path) -> None:
    """The same file in another folder, or a copy where the disk has no links; folders are as open as they were."""
    place = target / path.relative_to(source)
    _make_like(path.parent, place.parent)
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def _make_like(folder: Path, made: Path) -> None:
    if not made.is_dir():
        _make_like(folder.parent, made.parent)
        made.mkdir()
        shutil.copymode(folder, made)
