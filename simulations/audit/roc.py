"""How well scores tell members from others: area under the curve, the strict end of it, and the single patient."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, mannwhitneyu, norm, rankdata

Float = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
FALSE_POSITIVE_RATE = 0.01
FALSE_ALARM = 1e-3
"""False-alarm rate of a control: how often a sound attack is said to find what is not there."""


@dataclass(frozen=True)
class Membership:
    """What one attack found; larger scores mean rather a member.

    Attributes:
        num_members: Patients who trained.
        num_others: Patients who did not.
        auc: Probability that a member scores above another patient, ties half; 0.5 is chance.
        auc_ci95: DeLong's interval.
        tpr: Share of members above the threshold that at most 1 % of the others pass.
        tpr_ci95: Clopper and Pearson's interval at that threshold.
        largest_member: The largest member's score, in standard deviations of the others' scores above their mean.
        largest_other: The same for the largest of the others: what chance alone gave here.
        num_above_all_others: Members above every other patient.
        p_above_all_others: Probability of at least so many if membership changes nothing.
        control_auc: The attack's control, members against members: AUC of one half of them against the other half,
            between which there is nothing to find.
        p_control: Probability of an AUC at least so far from 0.5 by chance.
    """

    num_members: int
    num_others: int
    auc: float
    auc_ci95: Interval
    tpr: float
    tpr_ci95: Interval
    largest_member: float
    largest_other: float
    num_above_all_others: int
    p_above_all_others: float
    control_auc: float
    p_control: float

    @property
    def control_holds(self) -> bool:
        """Whether the attack finds nothing where there is nothing; what else it says means nothing otherwise."""
        return self.p_control >= FALSE_ALARM

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdicts."""
        low, high = self.auc_ci95
        return {**asdict(self), "contains_chance": low <= 0.5 <= high, "control_holds": self.control_holds}


def membership(members: Float, others: Float, first_half: NDArray[np.bool_] | None = None) -> Membership:
    """All figures of an attack's scores, shapes (n1,) and (n0,), both of at least 2 and finite.

    Args:
        members: Scores of patients who trained.
        others: Scores of patients who did not.
        first_half: Shape (n1,): which members are compared with the rest of them, chosen without the scores; None for
            the first half.
    """
    if min(len(members), len(others)) < 2 or not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ValueError("Expected at least two finite scores of members and of others.")
    auc, auc_interval = auc_delong(members, others)
    threshold = np.sort(others)[::-1][math.floor(FALSE_POSITIVE_RATE * len(others))]
    hits = int(np.count_nonzero(members > threshold))
    above = int(np.count_nonzero(members > others.max()))
    spread = float(others.std(ddof=1)) or 1.0
    first = np.arange(len(members)) < len(members) // 2 if first_half is None else first_half
    control_auc, p_control = control(members[first], members[~first])
    return Membership(
        num_members=len(members),
        num_others=len(others),
        auc=auc,
        auc_ci95=auc_interval,
        tpr=hits / len(members),
        tpr_ci95=clopper_pearson(hits, len(members)),
        largest_member=float(members.max() - others.mean()) / spread,
        largest_other=float(others.max() - others.mean()) / spread,
        num_above_all_others=above,
        p_above_all_others=_p_above(above, len(members), len(others)),
        control_auc=control_auc,
        p_control=p_control,
    )


def control(first: Float, second: Float) -> tuple[float, float]:
    """AUC of one group against another, and how likely one so far from 0.5 is where nothing tells them apart.

    Mann and Whitney (1947), https://doi.org/10.1214/aoms/1177730491, two-sided; exact for few patients.
    """
    found = mannwhitneyu(first, second)
    p_value = float(found.pvalue)
    return float(found.statistic) / (len(first) * len(second)), 1.0 if math.isnan(p_value) else p_value


def auc_delong(members: Float, others: Float) -> tuple[float, Interval]:
    """Area under the ROC curve and its 95 % interval, cut to [0, 1].

    DeLong et al. (1988), https://doi.org/10.2307/2531595, with the midranks of Sun and Xu (2014),
    https://doi.org/10.1109/LSP.2014.2337313.
    """
    n1, n0 = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    of_members = (ranks[:n1] - rankdata(members)) / n0
    of_others = 1 - (ranks[n1:] - rankdata(others)) / n1
    auc = float(of_members.mean())
    deviation = math.sqrt(of_members.var(ddof=1) / n1 + of_others.var(ddof=1) / n0)
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    return auc, (max(auc - half, 0.0), min(auc + half, 1.0))


def clopper_pearson(successes: int, trials: int) -> Interval:
    """Exact 95 % interval of a share (Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404)."""
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def _p_above(count: int, num_members: int, num_others: int) -> float:
    """Probability that the `count` highest of all exchangeable patients are members: C(n1, k) / C(n1 + n0, k)."""
    shares = [(num_members - i) / (num_members + num_others - i) for i in range(count)]
    return math.prod(shares)
