"""What a published table may show of a few patients: joined small groups, no r2 of a handful, rounded figures.

Guarantees: no cell of a table covers fewer than `MIN_GROUP` patients, and no smaller group follows by subtracting the
cells of one table from its total, because small groups are joined until they are large enough. Not covered: differences
between the tables of different facts (for example vendor and sex), and prior knowledge of the patients.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedcmr.server.evaluation.fidelity.anatomy import QUANTITIES
from fedcmr.server.evaluation.score import FEW_PATIENTS
from fedcmr.shared.tasks.ejection_fraction.sums import MIN_GROUP

OTHERS = "others"
"""Name of the group that joins those too small to be published."""
DIGITS = {
    "mse": 4,
    "r2": 2,
    "mae_points": 1,
    "r": 2,
    "bias_points": 1,
    "loa_low_points": 1,
    "loa_high_points": 1,
    "category_agreement": 2,
    "category_kappa": 2,
    "difference_points": 1,
    "mean_sd_points": 1,
    "rank_correlation": 2,
    "observed": 2,
    "share_in_heart": 2,
    "area_share": 2,
    "dice": 2,
    "hd95_mm": 1,
    "ef_mae_points": 1,
    "ef_bias_points": 1,
    "frd": 1,
    "kid": 2,
    "precision": 2,
    "recall": 2,
    "auc_heart": 2,
    "auc_image": 2,
    **{f"{key}{kind}": 1 for key in QUANTITIES for kind in ("_mean", "_sd")},
    **{f"wasserstein_{key}": 1 for key in QUANTITIES},
}
"""Decimals of the figures of real patients: enough for a reader, and too few to solve for one patient's value."""


def joined(labels: Sequence[str]) -> list[str]:
    """Group labels in which no group is smaller than `MIN_GROUP`: the smaller ones become `OTHERS`.

    Where these together are still too few, the next larger group joins them. Otherwise the total minus all other groups
    would disclose them.

    Args:
        labels: One per patient. Fewer than `MIN_GROUP` patients in all must not be published.
    """
    sizes = Counter(labels)
    small = {label for label, size in sizes.items() if size < MIN_GROUP}
    while small and sum(sizes[label] for label in small) < MIN_GROUP and len(small) < len(sizes):
        small.add(min((label for label in sizes if label not in small), key=lambda label: (sizes[label], label)))
    return [OTHERS if label in small else label for label in labels]


def overlap_discloses_few(memberships: Sequence[tuple[str, str]]) -> bool:
    """Whether a table of the patients that two tables share would, beside them, disclose fewer than `MIN_GROUP`.

    What can be subtracted from what are whole cells of this cross-table; if none is small, no difference is.

    Args:
        memberships: Of every patient in either table the group in the one and in the other; empty where in none.
    """
    return any(size < MIN_GROUP for size in Counter(memberships).values())


def published(figures: Any, rounded: bool) -> Any:
    """Tables as they may be published: no r2 below `FEW_PATIENTS` patients, and figures of real patients rounded.

    Args:
        figures: Scores, nested in mappings by test set, model or group; a score has `n_patients`.
        rounded: Whether to round, to `DIGITS`.
    """
    if not isinstance(figures, Mapping):
        return figures
    if "n_patients" not in figures:
        return {name: published(values, rounded) for name, values in figures.items()}
    score = dict(figures)
    if "r2" in score and score["n_patients"] < FEW_PATIENTS:
        score["r2"] = None
        score["ci95"] = {**score["ci95"], "r2": None}
    return _rounded(score) if rounded else score


def _rounded(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score with the digits that may be published; `ci95` holds an interval for every figure, or for the only one."""
    (own,) = [name for name in ("difference_points", "share_in_heart", "observed") if name in score] or [""]
    values: dict[str, Any] = {}
    for name, value in score.items():
        if name == "coverage":
            values[name] = [_rounded(row) for row in value]
        elif name == "ci95" and isinstance(value, Mapping):
            values[name] = {metric: _round(bounds, DIGITS[metric]) for metric, bounds in value.items()}
        elif name == "ci95":
            values[name] = _round(value, DIGITS[own])
        else:
            values[name] = _round(value, DIGITS[name]) if name in DIGITS else value
    return values


def _round(value: Any, digits: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_round(item, digits) for item in value]
    if isinstance(value, Mapping):
        return {name: _round(item, digits) for name, item in value.items()}
    return value if value is None else round(float(value), digits)
