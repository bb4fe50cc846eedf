"""How well masks are found: overlap, distance of borders, and the ejection fraction that follows from them.

Overlap and distance are MONAI's, over each frame's stack as a volume. Contours may be there in part: a structure counts
for a patient in the frames in which it is drawn, so a figure is the mean over ED and ES where both are, and of one of
them where the other is not. The mean of the three structures is of patients who have all three, and the ejection
fraction of those whose cavity is drawn in both frames. `n_drawn` gives the number of patients whom each figure covers.

A structure that is not found has an overlap of 0 and no distance, and no ejection fraction follows from a ventricle
that was not found: the figure of that patient's group is then undefined, and `n_undefined` says how many such patients
there are.

Guarantees: where a structure is drawn on some of a group's patients only, no figure covers fewer than `MIN_GROUP` of
them, also not by subtracting one figure from another; see `disclosable`.
"""

import math
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
from fedcmr.shared.case import LV, MYO, NOT_DRAWN, RV, Case
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.tasks.ejection_fraction.stack import patient_ef
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP

STRUCTURES = {"lv": LV, "myo": MYO, "rv": RV}
NUM_PHASES = "num_phases"
"""Columns that say in how many frames a structure is drawn, `num_phases/lv` and so on; for "mean" and "ef", whether
all is there that the figure needs. A figure counts where this is not 0."""
EF_FOUND = "ef_found"
DRAWN_IN = (*STRUCTURES, "mean", "ef")
PERCENTILE = 95
HEADINGS = ("n", "Dice LV", "MYO", "RV", "mean", "HD95 LV, mm", "MYO", "RV", "EF MAE, points", "bias")

Figures = dict[str, Any]


def score_masks(
    cases: Sequence[Case], predicted: Sequence[Tensor], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Figures]:
    """Figures of every group of patients, in alphabetical order, then of "all".

    Args:
        cases: Test patients whose masks are drawn, whole or in part.
        predicted: Labels found, each of shape (2, Z, H, W), on the case's own grid.
        groups: Shape (len(cases),), for example vendors.
        num_bootstrap: Resamples of patients for the 95 % intervals.
        seed: Seed of the resampling.

    Returns:
        {group: n_patients, n_undefined, n_drawn {lv, myo, rv, mean, ef}, dice {lv, myo, rv, mean}, hd95_mm {lv, myo,
        rv}, ef_mae_points, ef_bias_points, and ci95 of the same shape}; None where undefined or too few are drawn.
    """
    return score_values(per_patient(cases, predicted), groups, num_bootstrap, seed)


def score_values(
    of_patients: Mapping[str, Any], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Figures]:
    """`score_masks` of what `per_patient` returned, in this version or in one whose masks were all complete."""
    columns = {key: np.asarray(column, np.float64) for key, column in disclosable(of_patients, groups).items()}
    drawn = {name: columns.pop(f"{NUM_PHASES}/{name}") > 0 for name in DRAWN_IN}
    columns.pop(EF_FOUND, None)
    gates = {key: drawn[key.partition("/")[2] or "ef"] for key in columns}
    undefined = np.any([gates[key] & ~np.isfinite(values) for key, values in columns.items()], axis=0)
    scores = {}
    for name, chosen in vendor_groups(groups).items():
        figures: Figures = {
            "n_patients": int(chosen.sum()),
            "n_undefined": int((chosen & undefined).sum()),
            "n_drawn": {part: int((chosen & where).sum()) or None for part, where in drawn.items()},
        }
        intervals: Figures = {}
        for key, values in columns.items():
            part, _, structure = key.partition("/")
            of_group = values[chosen & gates[key]]
            defined = bool(len(of_group) and np.isfinite(of_group).all())
            mean = float(of_group.mean()) if defined else None
            bounds = mean_interval(of_group, num_bootstrap, seed) if defined else None
            if structure:
                figures.setdefault(part, {})[structure] = mean
                intervals.setdefault(part, {})[structure] = bounds
            else:
                figures[part], intervals[part] = mean, bounds
        scores[name] = {**figures, "ci95": intervals}
    return scores


def paired_dice(
    of_patients: Mapping[str, Any], others: Mapping[str, Any], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Figures]:
    """How much larger one segmenter's mean Dice is than another's, patient by patient, in points (hundredths).

    Args:
        of_patients: What `per_patient` returned for the one, as in `disclosable`.
        others: For the other, on the same patients.
        groups: Shape (N,), small groups joined.
        num_bootstrap: Resamples of patients for the 95 % intervals.
        seed: Seed of the resampling.

    Returns:
        {group or "all": n_patients, those who have all three structures; difference_points, above 0 where the one is
        better, and ci95}; None where there is nobody.
    """
    kept = disclosable(of_patients, groups)
    drawn = np.asarray(kept[f"{NUM_PHASES}/mean"]) > 0
    one, other = (np.asarray(values["dice/mean"], np.float64) for values in (kept, others))
    table = {}
    for name, chosen in vendor_groups(groups).items():
        points = POINTS * (one - other)[chosen & drawn]
        table[name] = {
            "n_patients": len(points),
            "difference_points": float(points.mean()) if len(points) else None,
            "ci95": mean_interval(points, num_bootstrap, seed),
        }
    return table


def disclosable(of_patients: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """What `per_patient` returned, without what figures may not cover; `num_phases` is 0 there.

    Where only some patients of a group have a structure, and fewer than `MIN_GROUP`, it is left out of the group's
    figures and of those of "all", so that nothing can be subtracted. The mean of three structures is left out likewise,
    and also where the patients who have some of them but not all three are so few: their values would follow from the
    mean and the structures' own figures.

    Args:
        of_patients: {figure: shape (N,)}; without `num_phases`, as earlier versions wrote them, all is drawn.
        groups: Shape (N,), small groups joined.
    """
    kept = dict(of_patients)
    num = len(groups)
    drawn = {name: np.asarray(kept.get(f"{NUM_PHASES}/{name}", np.full(num, 2.0)), np.float64) for name in DRAWN_IN}
    names = np.asarray(groups)
    for group in np.unique(names):
        chosen = names == group
        for name in (*STRUCTURES, "ef", "mean"):  # the mean last: it depends on which structures are left
            has = chosen & (drawn[name] > 0)
            few = 0 < has.sum() < min(MIN_GROUP, chosen.sum())
            if name == "mean":
                some = chosen & np.any([drawn[part] > 0 for part in STRUCTURES], axis=0)
                few = few or 0 < (some & ~has).sum() < MIN_GROUP
            if few:
                drawn[name][chosen] = 0
    return kept | {f"{NUM_PHASES}/{name}": values for name, values in drawn.items()}


def overlap_and_distance(found: Tensor, true: Tensor, spacing_mm: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Dice overlap and 95th percentile of the symmetric distance of surfaces, in millimetres, of every structure.

    Args:
        found: Labels, shape (B, Z, H, W).
        true: True labels of the same shape, and `NOT_DRAWN`; see `judged_at`.
        spacing_mm: Spacing of slices, rows and columns.

    Returns:
        Both of shape (B, 3), in the order of `STRUCTURES`. Where a structure is in neither, both are NaN; where it is
        in one only, the overlap is 0 and the distance NaN. What is found where nobody drew does not count.
    """
    order = [label - 1 for label in STRUCTURES.values()]
    known = torch.where(true == NOT_DRAWN, 0, true)
    pair = [F.one_hot(labels.long(), LV + 1).movedim(-1, 1) for labels in (found, known)]
    if (true == NOT_DRAWN).any():
        pair[0][:, 1:] *= judged_at(true)
    distance_of = HausdorffDistanceMetric(include_background=False, percentile=PERCENTILE, reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of absent structures; here they are NaN
        distance = distance_of(*pair, spacing=list(spacing_mm))
        overlap = DiceMetric(include_background=False, reduction="none", ignore_empty=False)(*pair)
    absent = (pair[0].flatten(2).sum(2) + pair[1].flatten(2).sum(2) == 0)[:, 1:]
    overlap = overlap.masked_fill(absent, torch.nan)
    return overlap[:, order], distance.masked_fill(~distance.isfinite(), torch.nan)[:, order]


def judged_at(true: Tensor) -> Tensor:
    """Where it is known of every pixel whether it belongs to a structure; shape (B, 3, Z, H, W), bool, labels 1 to 3.

    In a frame that lacks a structure every pixel without a label is `NOT_DRAWN`, whatever else is drawn. There a
    structure is known in the slices that show it, where the other pixels are not part of it, and elsewhere it may have
    been passed over. In a frame with all three structures, `NOT_DRAWN` is what nobody knows.

    Args:
        true: Labels and `NOT_DRAWN`, shape (B, Z, H, W).
    """
    labels = (RV, MYO, LV)
    is_structure = torch.stack([true == label for label in labels], dim=1)
    whole = is_structure.flatten(2).any(2).all(1)[:, None, None, None, None]
    drawn = (true != NOT_DRAWN)[:, None]
    shows = is_structure.flatten(3).any(3)[..., None, None]
    return torch.where(whole, drawn, drawn | shows)


def per_patient(cases: Sequence[Case], predicted: Sequence[Tensor]) -> dict[str, NDArray[np.float64]]:
    """One value per patient of every figure: {"part/structure" or "part": shape (N,)}.

    NaN where a figure is undefined, or where nothing is drawn that it could be of; the columns `num_phases` tell these
    apart. `EF_FOUND` is the ejection fraction of the masks found, whatever is drawn.
    """
    rows = []
    for case, found in zip(cases, predicted, strict=True):
        true = torch.from_numpy(case.masks)
        overlap, distance = overlap_and_distance(found, true, [float(mm) for mm in case.spacing_mm])
        drawn = torch.stack([(true == label).flatten(1).any(1) for label in STRUCTURES.values()], dim=1)
        overlap, distance = (_mean_where(drawn, values.double()) for values in (overlap, distance))
        has_all, has_ef = bool(drawn.any(0).all()), math.isfinite(ejection_fraction(case.masks))
        ef = ejection_fraction(found.numpy())
        error = POINTS * (ef - patient_ef(case)) if has_ef else math.nan
        row = [*overlap.tolist(), float(overlap.mean()), *distance.tolist(), abs(error), error]
        rows.append([*row, *drawn.sum(0).tolist(), has_all, has_ef, ef])
    keys = [*(f"dice/{name}" for name in (*STRUCTURES, "mean")), *(f"hd95_mm/{name}" for name in STRUCTURES)]
    keys += ["ef_mae_points", "ef_bias_points", *(f"{NUM_PHASES}/{name}" for name in DRAWN_IN), EF_FOUND]
    return dict(zip(keys, np.array(rows, np.float64).reshape(-1, len(keys)).T, strict=True))


def _mean_where(drawn: Tensor, values: Tensor) -> Tensor:
    """Mean over the frames, the first axis, in which a structure is drawn; NaN where it is in none."""
    return torch.where(drawn, values, 0).sum(0) / drawn.sum(0)


def as_text_table(title: str, scores: Mapping[str, Figures]) -> Table:
    """Figures for the terminal, with the intervals of the means; those of the others are in JSON and CSV."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("vendor", no_wrap=True)
    for heading in HEADINGS:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, figures in scores.items():
        dice, distance, interval = figures["dice"], figures["hd95_mm"], figures["ci95"]
        num, drawn = f"{figures['n_patients']}", figures["n_drawn"]
        shown.add_row(
            name,
            num + (f", {figures['n_undefined']} undefined" if figures["n_undefined"] else ""),
            *(_cell(dice[part], 2) + _fewer(drawn[part], figures) for part in STRUCTURES),
            _cell(dice["mean"], 2, interval["dice"]["mean"]) + _fewer(drawn["mean"], figures),
            *(_cell(distance[structure], 1) for structure in STRUCTURES),
            _cell(figures["ef_mae_points"], 1, interval["ef_mae_points"]) + _fewer(drawn["ef"], figures),
            _cell(figures["ef_bias_points"], 1),
        )
    return shown


def _cell(value: float | None, digits: int, bounds: Sequence[float] | None = None) -> str:
    """A figure with its interval; a dash where it is undefined."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]" if bounds else "")


def _fewer(num: int | None, figures: Figures) -> str:
    """How many patients a figure is of, where these are not all."""
    return "" if num is None or num == figures["n_patients"] else f" (n {num})"
