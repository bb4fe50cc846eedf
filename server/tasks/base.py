"""What a downstream task is: a network that learns from cases and whose predictions are scored on other patients.

A new task is a folder with a `Task` and one line in `fedcmr.server.tasks.registry.TASKS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.table import Table
from torch import nn

from fedcmr.server.settings import Config
from fedcmr.shared.case import Case

Model = TypeVar("Model", bound=nn.Module)
Examples = TypeVar("Examples")
Predictions = TypeVar("Predictions")


class Task(ABC, Generic[Model, Examples, Predictions]):
    """One task: its training examples, its network, its scores.

    Attributes:
        needs: What a labelled case has, with its article; only labelled cases are used for training and tests.
        format: `format` in the header of the task's model files, which identifies them.
        section: Template of the report's section, below `server/tasks`; shown where a run has figures. None
            where the report has no section of the task.
    """

    needs: ClassVar[str]
    format: ClassVar[str]
    section: ClassVar[str | None] = None

    @abstractmethod
    def num_steps(self, config: Config) -> int:
        """Steps of a training under these settings."""

    @abstractmethod
    def is_labelled(self, case: Case) -> bool:
        """Whether a case has what the task `needs`."""

    @abstractmethod
    def examples(self, cases: Sequence[Case], config: Config) -> Examples:
        """Training examples from the labelled cases.

        Raises:
            UserError: No case is labelled.
        """

    @abstractmethod
    def train(
        self,
        cases: Sequence[Case],
        config: Config,
        device: torch.device,
        checkpoint: Path | None = None,
        description: str = "training",
        log: Callable[[int, float], None] | None = None,
    ) -> Model:
        """Train a network on the examples of these cases.

        Args:
            cases: Training cases; those that are not labelled are left out.
            config: The task's own settings and the seed are used.
            device: Where to train.
            checkpoint: Resumed from where it is of the same training, and removed at the end.
            description: What is trained, shown next to the progress bar.
            log: As for `fedcmr.server.training.loop.train`.

        Returns:
            The network in evaluation mode.

        Raises:
            UserError: No case is labelled, or the loss is not finite.
        """

    @abstractmethod
    def save(self, path: Path, model: Model, cases: Sequence[Case], config: Config, data: str) -> Path | None:
        """Write the model, what it was trained on in the file's header, and a card next to it.

        Args:
            path: New file, ending in .safetensors.
            model: The trained network.
            cases: What it was trained on.
            config: The settings of the training.
            data: What the cases are, in sentences for the card.

        Returns:
            The card.
        """

    @abstractmethod
    def load(self, path: Path) -> Model:
        """Read a file of `save`, in evaluation mode.

        Raises:
            UserError: The file is missing, or is not a model of this task.
        """

    @abstractmethod
    def predict(self, model: Model, cases: Sequence[Case], config: Config, device: torch.device) -> Predictions:
        """Predictions for every case, from its frames alone."""

    @abstractmethod
    def score(
        self, model: Model, cases: Sequence[Case], predictions: Predictions, groups: Sequence[str], config: Config
    ) -> Mapping[str, Any]:
        """The figures of one test set.

        Args:
            model: The trained network, which also holds facts about its training.
            cases: Labelled test patients.
            predictions: What `predict` returned for them.
            groups: Each patient's vendor, small groups joined.
            config: Resamples of the intervals and the seed are used.

        Returns:
            {part of report.json: its figures}; a slash leads into a part, as in "baselines/predict_the_mean".
        """

    @abstractmethod
    def warnings(self, figures: Mapping[str, Any]) -> list[str]:
        """What a reader of one test set's figures should know, each in a clause."""

    @abstractmethod
    def tables(self, report: Mapping[str, Any], test_set: str) -> list[Table]:
        """One test set's figures for the terminal, from a report of this task's parts."""
