"""Segmentation: a U-Net that finds ventricles and muscle on pairs of slices."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fedcmr.server.settings import Config
from fedcmr.server.tasks.base import PatientValues, Section, Task
from fedcmr.server.tasks.facts import versions
from fedcmr.server.tasks.segmentation.examples import NEEDS, Examples, can_test, prepare_examples
from fedcmr.server.tasks.segmentation.scores import as_text_table, disclosable, per_patient, score_values
from fedcmr.server.tasks.segmentation.training import train_on_cases
from fedcmr.shared.case import Case
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.segmenter import FORMAT, Segmenter, load_segmenter, save_segmenter
from fedcmr.shared.tasks.segmentation.teaching import can_teach
from fedcmr.shared.views import Grid

PART = "segmentation"
"""The task's part of report.json."""


class Segmentation(Task[Segmenter, Examples, list[Tensor]]):
    """The U-Net and its scores: `segmentation` of report.json."""

    needs = NEEDS
    format = FORMAT
    part = PART

    def num_steps(self, config: Config) -> int:
        """See `Task.num_steps`."""
        return config.segmentation.num_steps

    def is_labelled(self, case: Case) -> bool:
        """Whether people drew masks, whole or in part; see `can_test`."""
        return can_test(case)

    def can_teach(self, case: Case) -> bool:
        """Whether the masks are complete, or say where they are not; see `can_teach`."""
        return can_teach(case)

    def examples(self, cases: Sequence[Case], config: Config) -> Examples:
        """All slices of the cases with masks."""
        return prepare_examples(cases, Grid(config.segmentation.size_px, config.segmentation.pixel_mm))

    def train(
        self,
        cases: Sequence[Case],
        config: Config,
        device: torch.device,
        checkpoint: Path | None = None,
        description: str = "training the segmenter",
        log: Callable[[int, float], None] | None = None,
    ) -> Segmenter:
        """See `Task.train`."""
        return train_on_cases(cases, config.segmentation, config.seed, device, checkpoint, description, log)

    def save(self, path: Path, model: Segmenter, cases: Sequence[Case], config: Config, data: str) -> Path | None:
        """Write the weights as float16 and a card in JSON; about the training patients it has counts only."""
        used = [case for case in cases if can_teach(case)]
        facts = {
            "trained_on": len(used),
            "vendors": dict(sorted(Counter(case.info.vendor for case in used).items())),
            "data": data,
            "seed": config.seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "elapsed_s": None if model.elapsed_s is None else round(model.elapsed_s, 1),
            "settings": asdict(config.segmentation),
            "versions": versions(),
        }
        save_segmenter(path, model, facts)
        card = path.with_suffix(".json")
        write_atomically(card, (json.dumps(facts, indent=2) + "\n").encode())
        return card

    def load(self, path: Path) -> Segmenter:
        """See `Task.load`."""
        return load_segmenter(path)

    def predict(self, model: Segmenter, cases: Sequence[Case], config: Config, device: torch.device) -> list[Tensor]:
        """Labels of every case; see `predict_masks`."""
        return predict_masks(model.to(device), cases)

    def per_patient(self, cases: Sequence[Case], predictions: list[Tensor]) -> PatientValues:
        """Overlap, distances and the ejection fraction's error of every patient."""
        return {name: values.tolist() for name, values in per_patient(cases, predictions).items()}

    def disclosable(self, values: PatientValues, groups: Sequence[str]) -> PatientValues:
        """Without structures that too few patients of a group have; see `scores.disclosable`."""
        kept = disclosable(values, groups)
        return {name: column.tolist() if isinstance(column, np.ndarray) else column for name, column in kept.items()}

    def table(self, values: PatientValues, groups: Sequence[str], config: Config) -> Mapping[str, Any]:
        """Their means by vendor; see `score_values`."""
        return score_values(values, groups, config.evaluation.num_bootstrap, config.seed)

    def report_section(self, report: Mapping[str, Any]) -> Section | None:
        """The trained network's figures by vendor, then the other models' and the cross-vendor evaluation."""
        if not report.get(PART):
            return None
        others = (report.get("tasks") or {}).get("segmentation") or {}
        shown = {"baselines": others.get("baselines") or {}, "matrix": others.get("matrix") or {}}
        shown["differences"] = others.get("differences") or {}
        scores = [score for groups in report[PART].values() for score in groups.values()]
        shown["in_part"] = any({*(score.get("n_drawn") or {}).values()} - {score["n_patients"]} for score in scores)
        return Section("segmentation/section.html", shown)

    def warnings(self, figures: Mapping[str, Any]) -> list[str]:
        """Whether a structure was not found at all on some patient."""
        num, num_undefined = (figures[PART]["all"][key] for key in ("n_patients", "n_undefined"))
        if not num_undefined:
            return []
        return [
            f"on {num_undefined} of {num} patients a structure was not found: distances and ejection fractions that "
            "need it are left undefined"
        ]

    def tables(self, report: Mapping[str, Any], test_set: str) -> list[Table]:
        """One table, vendor by vendor."""
        return [as_text_table(test_set, report[PART][test_set])]
