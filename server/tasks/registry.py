"""The downstream tasks, by name. A new task is a folder here and one line below."""

from pathlib import Path
from typing import Any

from fedcmr.server.settings import MAIN_TASK, Config
from fedcmr.server.tasks.base import Task
from fedcmr.server.tasks.ejection_fraction.task import EjectionFraction
from fedcmr.server.tasks.segmentation.task import Segmentation
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError

TASKS: dict[str, Task[Any, Any, Any]] = {
    "ejection_fraction": EjectionFraction(),
    "segmentation": Segmentation(),
}


def task_named(name: str) -> Task[Any, Any, Any]:
    """The task of a name.

    Raises:
        UserError: There is none.
    """
    if name not in TASKS:
        raise UserError(f"Expected --task in {tuple(TASKS)}, got {name!r}.")
    return TASKS[name]


def tasks_of(config: Config) -> dict[str, Task[Any, Any, Any]]:
    """The tasks of a study, by name, the ejection fraction first.

    Raises:
        UserError: The settings name one that there is not.
    """
    for name in config.tasks:
        if name not in TASKS:
            raise UserError(f"Expected tasks to name some of {tuple(TASKS)}, got {name!r}.")
    return {name: TASKS[name] for name in (MAIN_TASK, *config.tasks)}


def task_of_model(path: Path) -> Task[Any, Any, Any]:
    """The task of a model's file, as its header states it.

    Raises:
        UserError: The file is missing, or is a model of no task.
    """
    found = checkpoint.load_metadata(path).get("format")
    for task in TASKS.values():
        if task.format == found:
            return task
    names = " or ".join(TASKS)
    raise UserError(f"{path} is not a model of a task: make one with 'fedcmr-server train --task {names}'")
