"""What a downstream task is: a network that learns from cases and whose predictions are scored on other patients.

A new task is a folder with a `Task` and one line in `fedcmr.server.tasks.registry.TASKS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
PatientValues = Mapping[str, Sequence[Any]]
"""{name: one number per patient}; what a study keeps of a model's predictions, for reports to be written from."""


@dataclass(frozen=True)
class Section:
    """A task's section of the report.

    Attributes:
        template: Its file, below `server/tasks`.
        values: What the template shows, as `section.values`, besides what every section knows.
    """

    template: str
    values: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC, Generic[Model, Examples, Predictions]):
    """One task: its training examples, its network, its scores.

    Attributes:
        needs: What a labelled case has, with its article; only labelled cases are used for training and tests.
        format: `format` in the header of the task's model files, which identifies them.
        part: Part of report.json with the trained network's figures, {test set: {vendor or "all": figures}}.
    """

    needs: ClassVar[str]
    format: ClassVar[str]
    part: ClassVar[str]

    @abstractmethod
    def num_steps(self, config: Config) -> int:
        """Steps of a training under these settings."""

    @abstractmethod
    def is_labelled(self, case: Case) -> bool:
        """Whether a case has what the task `needs`."""

    def can_teach(self, case: Case) -> bool:
        """Whether a case is of use for training; by default where it is labelled."""
        return self.is_labelled(case)

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
    def per_patient(self, cases: Sequence[Case], predictions: Predictions) -> PatientValues:
        """What of the predictions the figures are computed from, for labelled test patients."""

    def disclosable(self, values: PatientValues, groups: Sequence[str]) -> PatientValues:
        """The values without those that no figure may cover; by default all.

        A task needs this where some of its figures are of fewer patients than others. It is called for each test set
        before several are pooled, so that no pooled figure differs from a test set's own by a few patients.

        Args:
            values: What `per_patient` returned, read from JSON.
            groups: Each patient's vendor, small groups joined.
        """
        return values

    @abstractmethod
    def table(self, values: PatientValues, groups: Sequence[str], config: Config) -> Mapping[str, Any]:
        """Figures of every group of patients, then of "all".

        Args:
            values: What `per_patient` returned, read from JSON: an infinity or NaN is still there.
            groups: Each patient's vendor, small groups joined.
            config: Resamples of the intervals and the seed are used.
        """

    def paired_table(
        self, values: PatientValues, others: PatientValues, groups: Sequence[str], config: Config
    ) -> Mapping[str, Any] | None:
        """How much larger one model's error is than another's on the same patients, as `table`; None: not compared."""
        return None

    def score(
        self, model: Model, cases: Sequence[Case], predictions: Predictions, groups: Sequence[str], config: Config
    ) -> Mapping[str, Any]:
        """The figures of one test set, by default those of `table`.

        Args:
            model: The trained network, which also holds facts about its training.
            cases: Labelled test patients.
            predictions: What `predict` returned for them.
            groups: Each patient's vendor, small groups joined.
            config: Resamples of the intervals and the seed are used.

        Returns:
            {part of report.json: its figures}; a slash leads into a part, as in "baselines/predict_the_mean".
        """
        return {self.part: self.table(self.per_patient(cases, predictions), groups, config)}

    def report_section(self, report: Mapping[str, Any]) -> Section | None:
        """The task's section of a study's report; None where the report has no figures of it.

        Args:
            report: As in report.json. `part` holds the trained network's figures; `tasks`, by the task's name, those of
                its other models: `baselines` and `matrix`, as the report has them for the ejection fraction.
        """
        return None

    @abstractmethod
    def warnings(self, figures: Mapping[str, Any]) -> list[str]:
        """What a reader of one test set's figures should know, each in a clause."""

    @abstractmethod
    def tables(self, report: Mapping[str, Any], test_set: str) -> list[Table]:
        """One test set's figures for the terminal, from a report of this task's parts."""
