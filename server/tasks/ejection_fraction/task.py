"""Ejection fraction: a ResNet50 that predicts it from pairs of slices, without a mask."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fedcmr.server.evaluation.coverage import coverage
from fedcmr.server.evaluation.subgroups import subgroup_tables
from fedcmr.server.evaluation.tables import as_text_table, paired_table, predict_the_mean, table
from fedcmr.server.settings import Config
from fedcmr.server.tasks.base import PatientValues, Section, Task
from fedcmr.server.tasks.ejection_fraction.calibration import train_calibrated
from fedcmr.server.tasks.ejection_fraction.examples import Examples, prepare_examples
from fedcmr.server.tasks.ejection_fraction.model_card import training_facts, write_model_card
from fedcmr.shared.case import Case
from fedcmr.shared.tasks.ejection_fraction.inference import Predictions, predict
from fedcmr.shared.tasks.ejection_fraction.network import FORMAT, Regressor, load_regressor, save_regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef


class EjectionFraction(Task[Regressor, Examples, Predictions]):
    """The ResNet50 and its scores: `regression`, `baselines`, `subgroups` and `uncertainty` of report.json."""

    needs = "an ejection fraction"
    format = FORMAT
    part = "regression"

    def num_steps(self, config: Config) -> int:
        """See `Task.num_steps`."""
        return config.regression.num_steps

    def is_labelled(self, case: Case) -> bool:
        """Whether the case has an ejection fraction, in its row or by its masks, that no program found."""
        return math.isfinite(patient_ef(case))

    def can_teach(self, case: Case) -> bool:
        """Whether the case has an ejection fraction, whoever found it."""
        return math.isfinite(patient_ef(case))

    def examples(self, cases: Sequence[Case], config: Config) -> Examples:
        """The middle slices of every patient, or all of them where areas count."""
        return prepare_examples(cases, config.regression.area_share > 0)

    def train(
        self,
        cases: Sequence[Case],
        config: Config,
        device: torch.device,
        checkpoint: Path | None = None,
        description: str = "training the ResNet50",
        log: Callable[[int, float], None] | None = None,
    ) -> Regressor:
        """Train and calibrate; see `Task.train`."""
        options = {"checkpoint": checkpoint, "description": description, "log": log}
        return train_calibrated(cases, config.regression, config.seed, device, **options)

    def save(self, path: Path, model: Regressor, cases: Sequence[Case], config: Config, data: str) -> Path | None:
        """See `Task.save`."""
        save_regressor(path, model, training_facts(cases, config.regression, config.seed, data))
        return write_model_card(path)

    def load(self, path: Path) -> Regressor:
        """See `Task.load`."""
        return load_regressor(path)

    def predict(self, model: Regressor, cases: Sequence[Case], config: Config, device: torch.device) -> Predictions:
        """Ejection fractions with their standard deviations."""
        return predict(model, cases, config.regression.num_tta, device)

    def per_patient(self, cases: Sequence[Case], predictions: Predictions) -> PatientValues:
        """True and predicted ejection fractions, and the predicted standard deviation of each error."""
        return {
            "true": [patient_ef(case) for case in cases],
            "predicted": [float(value) for value in predictions.ef],
            "sd": [float(value) for value in predictions.sd],
        }

    def table(self, values: PatientValues, groups: Sequence[str], config: Config) -> Mapping[str, Any]:
        """See `fedcmr.server.evaluation.tables.table`."""
        return table(values["true"], values["predicted"], groups, config.evaluation.num_bootstrap, config.seed)

    def paired_table(
        self, values: PatientValues, others: PatientValues, groups: Sequence[str], config: Config
    ) -> Mapping[str, Any]:
        """See `fedcmr.server.evaluation.tables.paired_table`."""
        num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
        return paired_table(values["true"], values["predicted"], others["predicted"], groups, num_bootstrap, seed)

    def score(
        self, model: Regressor, cases: Sequence[Case], predictions: Predictions, groups: Sequence[str], config: Config
    ) -> Mapping[str, Any]:
        """Errors by vendor and by what else is known, next to those of guessing the mean; coverage of the intervals."""
        true, predicted = [patient_ef(case) for case in cases], predictions.ef
        num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
        mean = predict_the_mean([model.mean_ef.item()], len(cases))
        return {
            "regression": table(true, predicted, groups, num_bootstrap, seed),
            "baselines/predict_the_mean": table(true, mean, groups, num_bootstrap, seed),
            "subgroups": subgroup_tables(cases, true, predicted, num_bootstrap, seed),
            "uncertainty": coverage(true, predicted, predictions.sd),
        }

    def report_section(self, report: Mapping[str, Any]) -> Section:
        """Its parts appear where they have figures, which may be the sites' alone."""
        return Section("ejection_fraction/section.html")

    def warnings(self, figures: Mapping[str, Any]) -> list[str]:
        """Whether the model gave predictions that are not finite."""
        num, num_undefined = (figures["regression"]["all"][key] for key in ("n_patients", "n_undefined"))
        if not num_undefined:
            return []
        return [
            f"the model has no prediction for {num_undefined} of {num} patients: the figures of their groups are left "
            "undefined; do its weights hold NaN?"
        ]

    def tables(self, report: Mapping[str, Any], test_set: str) -> list[Table]:
        """Vendors, next to the baseline, then groups where something is known of them."""
        models = {"model": report["regression"], **report["baselines"]}
        rows = {name.replace("_", " "): sets[test_set] for name, sets in models.items()}
        shown = [as_text_table(test_set, rows)]
        if report["subgroups"][test_set]:
            shown.append(as_text_table(f"{test_set}: the model, by group", report["subgroups"][test_set], "group"))
        return shown
