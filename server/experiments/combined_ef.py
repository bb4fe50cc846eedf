"""The ejection fraction of a patient by two networks: the ResNet50, the segmentation of the whole stack, and both.

The ResNet50 sees slices of the middle and no border; the segmentation sums the cavity over all slices and errs where
borders are hard to see. Where their errors differ, a weighted mean is better than either. Its weight is chosen on
synthetic hearts that neither was trained on, never on test patients: it costs no privacy, and no test figure is tuned.
On such hearts borders lie where the masks say, so that the weight may favour the segmentation more than scans would.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.evaluation.disclosure import overlap_discloses_few
from fedcmr.server.evaluation.score import POINTS
from fedcmr.server.evaluation.tables import paired_table, table
from fedcmr.server.experiments.models import model_path
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import MAIN_TASK, Config
from fedcmr.server.tasks.registry import TASKS
from fedcmr.server.tasks.segmentation.scores import EF_FOUND, NUM_PHASES
from fedcmr.shared.case import Case
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.permissions import private_folder

STAGE = "combined_ef"
NUM_CASES, SEED_OFFSET = 48, 7_001
"""Synthetic hearts that the weight is chosen on, at most, and what is added to the study's seed so that they are others
than those trained on."""
METRICS = ("mae_points", "bias_points")
Rows = Mapping[str, Sequence[Any]]
"""One test set of `save_predictions`, small groups joined."""


def choose_weight(run: RunFolder, cases: Sequence[Case]) -> None:
    """Predict synthetic hearts by both networks, and keep the weight and what it was chosen on.

    Args:
        run: The run, with the main models of both tasks; receives `checkpoints/combined_ef.json`.
        cases: Synthetic hearts that neither network was trained on.
    """
    config, device = run.config, pick_device(run.config.device)
    found = []
    for name in (MAIN_TASK, "segmentation"):
        task = TASKS[name]
        found.append(task.predict(task.load(model_path(run, name, MAIN_MODEL)), cases, config, device))
    by_masks = [ejection_fraction(labels.numpy()) for labels in found[1]]
    facts = calibration([case.info.ef for case in cases], found[0].ef, by_masks)
    private_folder(_path(run).parent)
    write_atomically(_path(run), (json.dumps(facts, indent=2) + "\n").encode())


def calibration(true: Sequence[float], by_network: Sequence[float], by_masks: Sequence[float]) -> dict[str, Any]:
    """The weight of the segmentation, and the errors on the hearts that it is chosen on.

    Args:
        true: Shape (N,), ejection fractions.
        by_network: Shape (N,), the ResNet50's.
        by_masks: Shape (N,), the segmentation's; NaN where no cavity was found, these hearts are left out.

    Returns:
        weight: In [0, 1], two decimals; 0 where the segmentation does not help.
        n_cases: Number of hearts.
        mae_points: Mean absolute error of "resnet50", "segmentation" and "both"; None without hearts.
    """
    truth, network, masks = (np.asarray(values, np.float64) for values in (true, by_network, by_masks))
    known = np.isfinite(truth) & np.isfinite(network) & np.isfinite(masks)
    truth, network, masks = truth[known], network[known], masks[known]
    weight = best_weight(truth, network, masks)
    methods = {"resnet50": network, "segmentation": masks, "both": together(network, masks, weight)}
    errors = {
        name: POINTS * float(np.abs(values - truth).mean()) if len(truth) else None for name, values in methods.items()
    }
    return {"weight": weight, "n_cases": len(truth), "mae_points": errors}


def best_weight(true: NDArray[np.float64], by_network: NDArray[np.float64], by_masks: NDArray[np.float64]) -> float:
    """The weight of the segmentation with the least squared error of (1 - weight) network + weight masks.

    With d = masks - network and e = true - network it is sum(d e) / sum(d^2), within [0, 1]; two decimals.
    """
    apart = by_masks - by_network
    square = float(apart @ apart)
    return round(float(np.clip(apart @ (true - by_network) / square, 0, 1)), 2) if square > 0 else 0.0


def together(by_network: NDArray[np.float64], by_masks: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """The weighted mean; the ResNet50's alone where no cavity was found."""
    return np.where(np.isfinite(by_masks), (1 - weight) * by_network + weight * by_masks, by_network)


def read_weight(run: RunFolder) -> dict[str, Any] | None:
    """What `choose_weight` kept; None in a run that did not."""
    return json.loads(_path(run).read_text(encoding="utf-8")) if _path(run).is_file() else None


def combined_scores(
    weight: float, patients: Sequence[Case], main: Rows, masked: Sequence[Case], masks: Rows, config: Config, real: bool
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """One test set's figures of the three ways, on the patients whose ejection fraction both networks give.

    Guarantees: of real patients there are no figures where those with and those without a segmentation, in the groups
    of either table, are fewer than `MIN_GROUP`: they would follow by subtraction.

    Args:
        weight: The segmentation's.
        patients: The main task's test patients.
        main: Their predictions.
        masked: The segmentation's test patients, in the same order.
        masks: Their predictions.
        config: Resamples of the intervals and the seed are used.
        real: Whether any of the patients is not recorded as simulated.

    Returns:
        {"resnet50" | "segmentation" | "both": {vendor or "all": n_patients, n_undefined, mae_points, bias_points,
        ci95}}, and {"segmentation" | "both": {vendor or "all": paired difference to the ResNet50's error}}; None where
        predictions are missing or are of other patients, or few patients would be disclosed.
    """
    if EF_FOUND not in masks or len(masks["vendors"]) != len(masked) or list(main["true"]) != _efs(patients):
        return None
    in_masks = [TASKS["segmentation"].is_labelled(case) for case in patients]
    in_main = [math.isfinite(case.info.ef) for case in masked]
    if sum(in_masks) != sum(in_main):
        return None
    drawn = np.asarray(masks[f"{NUM_PHASES}/ef"], np.float64) > 0
    shared = zip(np.flatnonzero(in_masks).tolist(), np.flatnonzero(in_main).tolist(), strict=True)
    pairs = [(i, j) for i, j in shared if drawn[j]]
    if not pairs:
        return None
    rows, columns = (list(indices) for indices in zip(*pairs, strict=True))
    groups = [str(main["vendors"][i]) for i in rows]
    if real:
        alone = [(str(main["vendors"][i]), "") for i in range(len(patients)) if i not in rows]
        alone += [("", str(masks["vendors"][j])) for j in np.flatnonzero(drawn).tolist() if j not in columns]
        both = [(group, str(masks["vendors"][j])) for group, j in zip(groups, columns, strict=True)]
        if overlap_discloses_few([*both, *alone]):
            return None
    true, network = (np.array([main[key][i] for i in rows], np.float64) for key in ("true", "predicted"))
    by_masks = np.array([masks[EF_FOUND][j] for j in columns], np.float64)
    ways = {"resnet50": network, "segmentation": by_masks, "both": together(network, by_masks, weight)}
    options = (groups, config.evaluation.num_bootstrap, config.seed)
    scores = {name: {g: _short(score) for g, score in table(true, efs, *options).items()} for name, efs in ways.items()}
    differences = {name: paired_table(true, ways[name], network, *options) for name in ("segmentation", "both")}
    return scores, differences


def _short(score: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: score[name] for name in ("n_patients", "n_undefined", *METRICS)}
    return {**kept, "ci95": {name: score["ci95"][name] for name in METRICS}}


def _efs(cases: Sequence[Case]) -> list[float]:
    return [case.info.ef for case in cases]


def _path(run: RunFolder) -> Path:
    return run.path / "checkpoints" / f"{STAGE}.json"
