"""How well masks are found: overlap, distance of borders, and the ejection fraction that follows from them.

Overlap and distance are MONAI's, over each frame's stack as a volume; a patient's figure is the mean over ED and ES. A
structure that is not found has an overlap of 0 and no distance, and no ejection fraction follows from a ventricle that
was not found: the figure of that patient's group is then undefined, and `n_undefined` says how many such patients
there are.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from fedcmr.server.evaluation.score import POINTS, mean_interval
from fedcmr.server.evaluation.tables import vendor_groups
from fedcmr.shared.case import LV, MYO, RV, Case
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef

STRUCTURES = {"lv": LV, "myo": MYO, "rv": RV}
PERCENTILE = 95
HEADINGS = ("n", "Dice LV", "MYO", "RV", "mean", "HD95 LV, mm", "MYO", "RV", "EF MAE, points", "bias")

Figures = dict[str, Any]


def score_masks(
    cases: Sequence[Case], predicted: Sequence[Tensor], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Figures]:
    """Figures of every group of patients, in alphabetical order, then of "all".

    Args:
        cases: Test patients with complete masks.
        predicted: Labels found, each of shape (2, Z, H, W), on the case's own grid.
        groups: Shape (len(cases),), for example vendors.
        num_bootstrap: Resamples of patients for the 95 % intervals.
        seed: Seed of the resampling.

    Returns:
        {group: n_patients, n_undefined, dice {lv, myo, rv, mean}, hd95_mm {lv, myo, rv}, ef_mae_points,
        ef_bias_points, and ci95 of the same shape}; None where undefined.
    """
    return score_values(per_patient(cases, predicted), groups, num_bootstrap, seed)


def score_values(
    of_patients: Mapping[str, Any], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Figures]:
    """`score_masks` of what `per_patient` returned."""
    columns = {key: np.asarray(column, np.float64) for key, column in of_patients.items()}
    undefined = ~np.all([np.isfinite(values) for values in columns.values()], axis=0)
    scores = {}
    for name, chosen in vendor_groups(groups).items():
        figures: Figures = {"n_patients": int(chosen.sum()), "n_undefined": int((chosen & undefined).sum())}
        intervals: Figures = {}
        for key, values in columns.items():
            part, _, structure = key.partition("/")
            of_group = values[chosen]
            defined = bool(np.isfinite(of_group).all())
            mean = float(of_group.mean()) if defined else None
            bounds = mean_interval(of_group, num_bootstrap, seed) if defined else None
            if structure:
                figures.setdefault(part, {})[structure] = mean
                intervals.setdefault(part, {})[structure] = bounds
            else:
                figures[part], intervals[part] = mean, bounds
        scores[name] = {**figures, "ci95": intervals}
    return scores


def overlap_and_distance(found: Tensor, true: Tensor, spacing_mm: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Dice overlap and 95th percentile of the symmetric distance of surfaces, in millimetres, of every structure.

    Args:
        found: Labels, shape (B, Z, H, W).
        true: True labels of the same shape.
        spacing_mm: Spacing of slices, rows and columns.

    Returns:
        Both of shape (B, 3), in the order of `STRUCTURES`. Where a structure is in neither, both are NaN; where it is
        in one only, the overlap is 0 and the distance NaN.
    """
    order = [label - 1 for label in STRUCTURES.values()]
    pair = [F.one_hot(labels.long(), LV + 1).movedim(-1, 1) for labels in (found, true)]
    distance_of = HausdorffDistanceMetric(include_background=False, percentile=PERCENTILE, reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of absent structures; here they are NaN
        distance = distance_of(*pair, spacing=list(spacing_mm))
        overlap = DiceMetric(include_background=False, reduction="none", ignore_empty=False)(*pair)
    absent = (pair[0].flatten(2).sum(2) + pair[1].flatten(2).sum(2) == 0)[:, 1:]
    overlap = overlap.masked_fill(absent, torch.nan)
    return overlap[:, order], distance.masked_fill(~distance.isfinite(), torch.nan)[:, order]


def per_patient(cases: Sequence[Case], predicted: Sequence[Tensor]) -> dict[str, NDArray[np.float64]]:
    """One value per patient of every figure: {"part/structure" or "part": shape (N,)}."""
    rows = []
    for case, found in zip(cases, predicted, strict=True):
        true = torch.from_numpy(case.masks)
        overlap, distance = overlap_and_distance(found, true, [float(mm) for mm in case.spacing_mm])
        overlap, distance = overlap.double().mean(0), distance.double().mean(0)
        error = POINTS * (ejection_fraction(found.numpy()) - patient_ef(case))
        rows.append([*overlap.tolist(), float(overlap.mean()), *distance.tolist(), abs(error), error])
    keys = [*(f"dice/{name}" for name in (*STRUCTURES, "mean")), *(f"hd95_mm/{name}" for name in STRUCTURES)]
    keys += ["ef_mae_points", "ef_bias_points"]
    return dict(zip(keys, np.array(rows).T, strict=True))


def as_text_table(title: str, scores: Mapping[str, Figures]) -> Table:
    """Figures for the terminal, with the intervals of the means; those of the others are in JSON and CSV."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("vendor", no_wrap=True)
    for heading in HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, figures in scores.items():
        dice, distance, interval = figures["dice"], figures["hd95_mm"], figures["ci95"]
        num = f"{figures['n_patients']}"
        shown.add_row(
            name,
            num + (f", {figures['n_undefined']} undefined" if figures["n_undefined"] else ""),
            *(_cell(dice[structure], 2) for structure in STRUCTURES),
            _cell(dice["mean"], 2, interval["dice"]["mean"]),
            *(_cell(distance[structure], 1) for structure in STRUCTURES),
            _cell(figures["ef_mae_points"], 1, interval["ef_mae_points"]),
            _cell(figures["ef_bias_points"], 1),
        )
    return shown


def _cell(value: float | None, digits: int, bounds: Sequence[float] | None = None) -> str:
    """A figure with its interval; a dash where it is undefined."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "")
