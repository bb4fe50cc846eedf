"""A ResNet50 judged on folders of cases, wherever these lie: a site can do it at home and keep what it does not tell.

What comes back are figures of groups of at least `MIN_GROUP` patients (see `disclosure`): no picture and no patient's
own number is among them, and those of real patients are rounded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcmr.server.evaluation.coverage import coverage
from fedcmr.server.evaluation.disclosure import joined, published
from fedcmr.server.evaluation.score import FEW_PATIENTS
from fedcmr.server.evaluation.subgroups import subgroup_tables
from fedcmr.server.evaluation.tables import predict_the_mean, table
from fedcmr.server.settings import Config
from fedcmr.shared.case import UNKNOWN, VENDORS, Case, load_cases
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import of_folder
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP


def evaluate_folders(
    model: Regressor, folders: Sequence[Path], config: Config, device: torch.device
) -> dict[str, dict[str, Any]]:
    """A model's scores on every folder, beside those of guessing its training labels' mean.

    What a reader of the scores should know of a folder (patients left out, vendors unknown here, answers that are no
    number, too few patients) is said on stderr, in numbers of patients.

    Returns:
        `regression`, `baselines`, `subgroups` and `uncertainty` in the shape of report.json, the folders as test sets.

    Raises:
        UserError: A folder cannot be read, has no patient with an ejection fraction, or fewer than `MIN_GROUP` who are
            not recorded as simulated.
    """
    report: dict[str, dict[str, Any]] = {
        "regression": {},
        "baselines": {"predict_the_mean": {}},
        "subgroups": {},
        "uncertainty": {},
    }
    num_bootstrap, seed = config.evaluation.num_bootstrap, config.seed
    for folder in folders:
        name, cases = str(folder), _labelled(folder)
        simulated = of_folder(folder).is_simulated
        if len(cases) < MIN_GROUP and not simulated:
            raise UserError(
                f"{folder} holds fewer than {MIN_GROUP} patients with an ejection fraction: figures of "
                "so few would tell about single ones, add patients or leave the folder out"
            )
        true, vendors = [patient_ef(case) for case in cases], joined(_vendors(folder, cases))
        predicted, sd = predict(model, cases, config.regression.num_tta, device)
        mean = predict_the_mean([model.mean_ef.item()], len(cases))
        found: dict[str, Any] = {
            "regression": table(true, predicted, vendors, num_bootstrap, seed),
            "uncertainty": coverage(true, predicted, sd),
            "subgroups": subgroup_tables(cases, true, predicted, num_bootstrap, seed),
        }
        for part, figures in found.items():
            report[part][name] = published(figures, rounded=not simulated)
        guess = table(true, mean, vendors, num_bootstrap, seed)
        report["baselines"]["predict_the_mean"][name] = published(guess, rounded=not simulated)
        _say_what_to_know(folder, report)
    return report


def _labelled(folder: Path) -> list[Case]:
    """A folder's patients with a known ejection fraction; how many were left out is said."""
    cases = load_cases(folder)
    known = [case for case in cases if np.isfinite(patient_ef(case))]
    if not known:
        raise UserError(f"{folder} holds no case with an ejection fraction or masks: nothing can be tested there")
    if len(known) < len(cases):
        _say(folder, f"{len(cases) - len(known)} of {len(cases)} cases have no ejection fraction")
    return known


def _vendors(folder: Path, cases: Sequence[Case]) -> list[str]:
    """Each case's vendor; a name that is none of `VENDORS` counts as unknown: no free text gets into a table."""
    others = sum(case.info.vendor not in (*VENDORS, UNKNOWN) for case in cases)
    if others:
        _say(
            folder,
            f"{others} of {len(cases)} cases name a vendor that is none of {', '.join(VENDORS)}: they count "
            f"as {UNKNOWN}",
        )
    return [case.info.vendor if case.info.vendor in VENDORS else UNKNOWN for case in cases]


def _say_what_to_know(folder: Path, report: dict[str, dict[str, Any]]) -> None:
    """About few patients, and answers that are no number."""
    by_vendor = report["regression"][str(folder)]
    undefined, num = by_vendor["all"]["n_undefined"], by_vendor["all"]["n_patients"]
    if undefined:
        _say(
            folder,
            f"the model has no answer for {undefined} of {num} patients: the figures of their groups are left "
            "undefined; do its weights hold NaN?",
        )
    if num < FEW_PATIENTS:
        _say(folder, f"{num} patients are too few to judge a model by: take the figures as an illustration")


def _say(folder: Path, text: str) -> None:
    print(f"{folder}: {text}", file=sys.stderr)
