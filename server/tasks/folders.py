"""Tests of one model on folders of cases: what `fedcmr-server evaluate` prints.

Guarantees: no figure covers fewer than `MIN_GROUP` patients who are not recorded as simulated, none follows by
subtracting one group from all, and figures of such patients are rounded (`fedcmr.server.evaluation.disclosure`).
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcmr.server.evaluation.disclosure import joined, published
from fedcmr.server.evaluation.score import FEW_PATIENTS
from fedcmr.server.settings import Config
from fedcmr.server.tasks.base import Task
from fedcmr.shared.case import UNKNOWN, VENDORS, Case, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import of_folder
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP


def evaluate_folders(
    task: Task[Any, Any, Any], model: Any, folders: Sequence[Path], config: Config, device: torch.device
) -> dict[str, Any]:
    """A model's figures on every folder.

    What a reader of the figures should know of a folder (patients left out, vendors unknown here, predictions that are
    not finite, too few patients) is written to stderr, as numbers of patients.

    Returns:
        The parts of report.json that are the task's, the folders as test sets.

    Raises:
        UserError: A folder cannot be read, has no labelled patient, or fewer than `MIN_GROUP` who are not recorded as
            simulated.
    """
    report: dict[str, Any] = {}
    for folder in folders:
        cases = _chosen(task, folder, task.is_labelled)
        if not cases:
            raise UserError(f"{folder} holds no case with {task.needs}: nothing can be tested there")
        simulated = of_folder(folder).is_simulated
        if len(cases) < MIN_GROUP and not simulated:
            raise UserError(
                f"{folder} holds fewer than {MIN_GROUP} patients with {task.needs}: figures of "
                "so few would disclose single ones, add patients or leave the folder out"
            )
        groups = joined(_vendors(folder, cases))
        figures = task.score(model, cases, task.predict(model, cases, config, device), groups, config)
        for part, values in figures.items():
            *path, name = part.split("/")
            place = report
            for key in path:
                place = place.setdefault(key, {})
            place.setdefault(name, {})[str(folder)] = published(values, rounded=not simulated)
        for warning in task.warnings(figures):
            _say(folder, warning)
        if len(cases) < FEW_PATIENTS:
            _say(
                folder, f"{len(cases)} patients are too few to evaluate a model on: take the figures as an illustration"
            )
    return report


def training_cases(task: Task[Any, Any, Any], folders: Sequence[Path]) -> list[Case]:
    """The cases of all folders that can teach; the number left out of each folder is written to stderr."""
    return [case for folder in folders for case in _chosen(task, folder, task.can_teach)]


def _chosen(task: Task[Any, Any, Any], folder: Path, chosen: Callable[[Case], bool]) -> list[Case]:
    """A folder's cases that are chosen for their labels; the number left out is written to stderr."""
    cases = load_cases(folder)
    labelled = [case for case in cases if chosen(case)]
    if len(labelled) < len(cases):
        _say(folder, f"{len(cases) - len(labelled)} of {len(cases)} cases are without {task.needs} and are left out")
    return labelled


def _vendors(folder: Path, cases: Sequence[Case]) -> list[str]:
    """Each case's vendor; a name that is not in `VENDORS` counts as unknown, so that no free text gets into a table."""
    others = sum(case.info.vendor not in (*VENDORS, UNKNOWN) for case in cases)
    if others:
        _say(
            folder,
            f"{others} of {len(cases)} cases name a vendor that is none of {', '.join(VENDORS)}: they count "
            f"as {UNKNOWN}",
        )
    return [case.info.vendor if case.info.vendor in VENDORS else UNKNOWN for case in cases]


def _say(folder: Path, text: str) -> None:
    print(f"{folder}: {text}", file=sys.stderr)
