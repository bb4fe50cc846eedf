"""Synthetic hearts against real ones, group by group: every measure with its interval, and what it is to be held to.

Every distance depends on how many patients are compared: few of the same kind look far apart. So every comparison of a
group is one of equally many patients a side, half of the group's real ones, drawn at random again and again: synthetic
against these, against others', real against real, the public prior's against these. The figure is the mean of the
draws. Their spread is that of half-sampling (McCarthy 1969, https://doi.org/10.2307/1402116), to first order the
bootstrap's over the real patients; as many synthetic ones are drawn only, so that the interval is rather too wide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from fedcmr.server.evaluation.fidelity.anatomy import QUANTITIES, anatomy
from fedcmr.server.evaluation.fidelity.discriminator import NUM_STEPS, auc, cross_fitted, heart_alone
from fedcmr.server.evaluation.fidelity.distances import Kernel, Manifolds, frechet_distance
from fedcmr.server.evaluation.fidelity.features import encoder_features, standardised
from fedcmr.server.evaluation.fidelity.radiomics import radiomics
from fedcmr.server.evaluation.fidelity.samples import (
    Region,
    Samples,
    common_regions,
    region_name,
    sample_slices,
)
from fedcmr.server.evaluation.score import CONFIDENCE, mean_interval
from fedcmr.shared.case import ED, LV, Case, is_heart
from fedcmr.shared.progress import track
from fedcmr.shared.tasks.segmentation.segmenter import load_segmenter
from fedcmr.shared.views import Grid

MIN_PATIENTS = 8
"""A half of fewer has no third neighbour, and its distances say nothing."""
MAX_PATIENTS = 100
"""Whose images are compared, of each group: more make the figures dearer and hardly surer."""
NUM_DRAWS = 100
OWN, OTHERS, HALVES, PRIOR_ONLY = "own", "others", "halves", "prior_only"
"""Comparisons of a group: synthetic with its real patients, synthetic with other groups' real patients, one half of its
real patients with the other, and the public prior's with its real patients."""
DISTANCES = ("frd", "kid", "precision", "recall")
TOO_FEW = f"fewer than {MIN_PATIENTS} test patients whose contours show the same structures"
NO_SYNTHETIC = f"fewer than {MIN_PATIENTS} synthetic patients"

Float = NDArray[np.float64]
Index = NDArray[np.int64]
Groups = Mapping[str, Sequence[Case]]
"""Patients by vendor, or by another name of a group."""


@dataclass(frozen=True)
class Effort:
    """What a measurement costs.

    Attributes:
        num_steps: Of each network that tells real from synthetic; 0 leaves these out.
        num_draws: Of equally many patients, for distances.
        num_bootstrap: Resamples of patients, for the rest.
        seed: Of all draws and networks.
    """

    num_steps: int = NUM_STEPS
    num_draws: int = NUM_DRAWS
    num_bootstrap: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class _Compared:
    """Patients of one role of a group: their slices, features and anatomy; of equally many patients but the last."""

    samples: Samples
    radiomics: Float
    encoder: Float
    anatomy: Mapping[str, Float]


def measure_fidelity(
    real: Groups, synthetic: Groups, prior_only: Groups, grid: Grid, effort: Effort = Effort()
) -> dict[str, Any]:
    """The block `fidelity` of report.json.

    Args:
        real: Test patients by group. Other groups' patients are those of other vendors than a group's own.
        synthetic: Synthetic patients of the same groups.
        prior_only: Those of the public prior only; empty where there are none.
        grid: Of the comparison: the generator's.
        effort: How much to do.

    Returns:
        `grid`; `structures`, those compared; `n_radiomics`; `n_draws`; `num_steps`; `groups`: {name: {`n_patients`,
        `n_synthetic`, `n_prior_only`, `n_others`; `n_half`, patients a side of a distance; `comparisons`: {`OWN` ...:
        {`n_patients`, `DISTANCES`, `auc_heart` and `auc_image` where a network was asked, `wasserstein_<quantity>`,
        `ci95`}}; `anatomy`: {"real" | "synthetic" | "prior_only": {`n_patients`, <quantity>_mean, <quantity>_sd,
        `ci95`}}}}; `not_measured`: {name: why}.
    """
    shown = {name: [case for case in cases if _has_ventricle(case)] for name, cases in real.items()}
    missing = {name: TOO_FEW for name, cases in shown.items() if len(cases) < MIN_PATIENTS}
    shown = {name: cases for name, cases in shown.items() if name not in missing}
    regions = common_regions(list(shown.values()), grid) if shown else []
    found = _compared(
        {
            **{("real", name): cases for name, cases in shown.items()},
            **{("synthetic", name): synthetic.get(name, ()) for name in shown},
            **{(PRIOR_ONLY, name): prior_only.get(name, ()) for name in shown},
        },
        regions,
        grid,
        effort.seed,
    )
    for name in list(shown):
        if len(found["real", name].samples) < MIN_PATIENTS:
            missing[name] = TOO_FEW
        elif len(found["synthetic", name].samples) < MIN_PATIENTS:
            missing[name] = NO_SYNTHETIC
    enough = [name for name in shown if missing.get(name) != TOO_FEW]
    vendors = {name: {case.info.vendor for case in shown[name]} for name in enough}
    groups = {}
    for name in track([name for name in enough if name not in missing], "comparing synthetic with real hearts"):
        others = [found["real", other] for other in enough if not vendors[other] & vendors[name]]
        roles = {
            "real": found["real", name],
            "synthetic": found["synthetic", name],
            OTHERS: _joined(others) if others else None,
            PRIOR_ONLY: found[PRIOR_ONLY, name] if len(found[PRIOR_ONLY, name].samples) >= MIN_PATIENTS else None,
        }
        groups[name] = _group({role: part for role, part in roles.items() if part}, regions, grid, effort)
    return {
        "grid": {"size_px": grid.size_px, "pixel_mm": grid.pixel_mm},
        "structures": [region_name(region) for region in regions],
        "n_radiomics": next((part.radiomics.shape[-1] for part in found.values()), 0),
        "n_draws": effort.num_draws,
        "num_steps": effort.num_steps,
        "groups": groups,
        "not_measured": missing,
    }


def _has_ventricle(case: Case) -> bool:
    return bool((case.masks[ED] == LV).any()) and bool(is_heart(case.masks).any())


def _compared(
    cases: Mapping[tuple[str, str], Sequence[Case]], regions: Sequence[Region], grid: Grid, seed: int
) -> dict[tuple[str, str], _Compared]:
    """What is compared of every role and group; features on the common scale of the real patients."""
    rng = np.random.default_rng(seed)
    chosen = {key: [of[i] for i in rng.permutation(len(of))[:MAX_PATIENTS]] for key, of in cases.items()}
    if not regions:
        return {}
    segmenter = load_segmenter()
    samples = {key: sample_slices(of, regions, grid) for key, of in chosen.items()}
    texture = {key: radiomics(part, regions) for key, part in samples.items()}
    seen = {key: encoder_features(segmenter, part, grid) for key, part in samples.items()}
    reference = [key for key in samples if key[0] == "real"]
    texture, seen = (standardised(features, reference) for features in (texture, seen))
    return {key: _Compared(samples[key], texture[key], seen[key], anatomy(cases[key])) for key in samples}


def _joined(parts: Sequence[_Compared]) -> _Compared:
    """Several groups' patients as one group's."""
    return _Compared(
        Samples(*(torch.cat([getattr(part.samples, name) for part in parts]) for name in ("images", "masks"))),
        np.concatenate([part.radiomics for part in parts]),
        np.concatenate([part.encoder for part in parts]),
        {name: np.concatenate([part.anatomy[name] for part in parts]) for name in QUANTITIES},
    )


def _group(roles: Mapping[str, _Compared], regions: list[Region], grid: Grid, effort: Effort) -> dict[str, Any]:
    """A group's part of the block; `roles` has "real", "synthetic", and perhaps `OTHERS` and `PRIOR_ONLY`."""
    num = {role: len(part.samples) for role, part in roles.items()}
    half = min(num["real"] // 2, *num.values())
    sides = {OWN: ("synthetic", "real"), HALVES: ("real", "real")}
    sides |= {OTHERS: ("synthetic", OTHERS)} if OTHERS in roles else {}
    sides |= {PRIOR_ONLY: (PRIOR_ONLY, "real")} if PRIOR_ONLY in roles else {}
    draws = _draws(roles, sides, half, effort)
    comparisons = {}
    for name in [name for name in (OWN, OTHERS, HALVES, PRIOR_ONLY) if name in sides]:
        row: dict[str, Any] = {"n_patients": num[sides[name][1]]}
        intervals: dict[str, Any] = {}
        for metric, values in draws[name].items():
            row[metric] = float(values.mean()) if len(values) else None
            intervals[metric] = [float(v) for v in np.percentile(values, CONFIDENCE)] if len(values) else None
        if name in (OWN, PRIOR_ONLY) and effort.num_steps:
            for view, (value, interval) in _aucs(roles["real"], roles[sides[name][0]], regions, grid, effort).items():
                row[view], intervals[view] = value, interval
        comparisons[name] = {**row, "ci95": intervals}
    described = [role for role in ("real", "synthetic", PRIOR_ONLY) if role in roles]
    return {
        "n_patients": num["real"],
        "n_synthetic": num["synthetic"],
        "n_prior_only": num.get(PRIOR_ONLY),
        "n_others": num.get(OTHERS),
        "n_half": half,
        "comparisons": comparisons,
        "anatomy": {role: _described(roles[role].anatomy, effort) for role in described},
    }


def _draws(
    roles: Mapping[str, _Compared], sides: Mapping[str, tuple[str, str]], half: int, effort: Effort
) -> dict[str, dict[str, Float]]:
    """{comparison: {metric: its value in every draw}}, the same real halves for all comparisons."""
    rng = np.random.default_rng(effort.seed)
    offsets = dict(zip(roles, np.cumsum([0, *(len(part.samples) for part in roles.values())]), strict=False))
    texture = np.concatenate([part.radiomics for part in roles.values()])
    seen = np.concatenate([part.encoder for part in roles.values()])
    kernel, manifolds = Kernel.of(seen), Manifolds.of(seen)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for _ in range(effort.num_draws):
        order = {role: rng.permutation(len(part.samples)) for role, part in roles.items()}
        hearts = {
            role: {key: rng.permutation(values[np.isfinite(values)]) for key, values in part.anatomy.items()}
            for role, part in roles.items()
        }
        for name, (first, second) in sides.items():
            apart = half if first == second else 0
            a, b = (offsets[role] + order[role][start : start + half] for role, start in ((first, apart), (second, 0)))
            metrics = {
                "frd": frechet_distance(texture[a], texture[b]),
                "kid": kernel.distance(a, b),
                "precision": manifolds.covered(a, by=b),
                "recall": manifolds.covered(b, by=a),
            }
            for key in QUANTITIES:
                parts = [hearts[role][key][start : start + half] for role, start in ((first, apart), (second, 0))]
                if all(len(part) == half for part in parts) and len(hearts[second][key]) >= MIN_PATIENTS:
                    metrics[f"wasserstein_{key}"] = float(wasserstein_distance(*parts))
            for metric, value in metrics.items():
                found[name].setdefault(metric, []).append(value)
    return {name: {metric: np.array(values) for metric, values in metrics.items()} for name, metrics in found.items()}


def _aucs(
    real: _Compared, synthetic: _Compared, regions: list[Region], grid: Grid, effort: Effort
) -> dict[str, tuple[float, list[float]]]:
    """The AUC of the heart alone and of the whole image, for as many synthetic patients as real ones."""
    num = min(len(real.samples), len(synthetic.samples))
    found = {}
    for view in ("auc_heart", "auc_image"):
        scanned, made = (
            (heart_alone(part.samples, regions, grid) if view == "auc_heart" else part.samples.images)[:num]
            for part in (real, synthetic)
        )
        scores = cross_fitted(scanned, made, effort.seed, effort.num_steps)
        found[view] = auc(scores, effort.num_bootstrap, effort.seed)
    return found


def _described(values: Mapping[str, Float], effort: Effort) -> dict[str, Any]:
    """Mean and SD of each quantity; None where fewer than `MIN_PATIENTS` patients show it."""
    row: dict[str, Any] = {"n_patients": max(len(column) for column in values.values())}
    intervals: dict[str, Any] = {}
    for key, column in values.items():
        known = column[np.isfinite(column)]
        enough = len(known) >= MIN_PATIENTS
        row[f"{key}_mean"], row[f"{key}_sd"] = (
            (float(known.mean()), float(known.std(ddof=1))) if enough else (None, None)
        )
        intervals[f"{key}_mean"] = mean_interval(known, effort.num_bootstrap, effort.seed) if enough else None
    return {**row, "ci95": intervals}
