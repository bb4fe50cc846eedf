"""Scores by further facts about the patients: field strength, pathology group, sex."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.evaluation.disclosure import OTHERS, joined
from fedcmr.server.evaluation.score import Score, score
from fedcmr.shared.case import UNKNOWN, Case, CaseInfo

SubgroupTables = dict[str, dict[str, Score]]
"""{fact: {group: score}}."""


def _field_strength(info: CaseInfo) -> str:
    return "" if math.isnan(info.field_strength_t) else f"{info.field_strength_t:g} T"


FACTS: dict[str, Callable[[CaseInfo], str]] = {
    "field strength": _field_strength,
    "pathology": lambda info: info.pathology,
    "sex": lambda info: info.sex,
}
"""Each fact's value in a patient's row; empty where it is unknown."""


def subgroup_tables(
    cases: Sequence[Case],
    true: NDArray[np.floating] | Sequence[float],
    predicted: NDArray[np.floating] | Sequence[float],
    num_bootstrap: int,
    seed: int,
) -> SubgroupTables:
    """`score` of every group of patients that share a fact; a fact that is unknown for all patients is left out.

    Groups are small and many, so one may differ by chance alone; its own interval does not account for this.
    Groups of fewer than `MIN_GROUP` patients are joined as `OTHERS`; a fact without any larger group is left out.

    Args:
        cases: N patients.
        true: Shape (N,), as in `score`.
        predicted: Shape (N,) or (S, N), in the order of `cases`.
        num_bootstrap: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        {fact of `FACTS`: {group: score}}: field strengths ascending, other groups alphabetically, `UNKNOWN` last.
    """
    truth, guess = np.asarray(true), np.asarray(predicted)
    if not len(cases) == len(truth) == guess.shape[-1]:
        raise ValueError(f"Expected equal lengths, got {len(cases)} cases, {len(truth)} and {guess.shape[-1]}.")
    tables: SubgroupTables = {}
    for fact, value_of in FACTS.items():
        values = joined([value_of(case.info) or UNKNOWN for case in cases])
        groups = sorted(set(values), key=_reading_order)
        if groups not in ([], [UNKNOWN], [OTHERS]):
            chosen = {group: np.array(values) == group for group in groups}
            tables[fact] = {
                group: score(truth[members], guess[..., members], num_bootstrap, seed)
                for group, members in chosen.items()
            }
    return tables


def _reading_order(group: str) -> tuple[bool, float, str]:
    """The unknown ones last, numbers by their size before anything else."""
    try:
        number = float(group.removesuffix(" T"))
    except ValueError:
        number = math.inf
    return group in (UNKNOWN, OTHERS), number, group
