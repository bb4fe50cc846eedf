"""Volumes, mass and wall thickness of hearts, from their masks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, Case
from fedcmr.shared.ejection_fraction import ejection_fraction

QUANTITIES = ("lv_ed_ml", "lv_es_ml", "mass_g", "wall_mm")
"""Left-ventricular volume at ED and at ES, mass of the myocardium at ED, and its mean thickness at ED."""
DENSITY_G_PER_ML = 1.05
"""Of myocardium: Schulz-Menger et al. (2020), https://doi.org/10.1186/s12968-020-00610-6."""
MM3_PER_ML = 1000.0

Float = NDArray[np.float64]


def anatomy(cases: Sequence[Case]) -> dict[str, Float]:
    """Each of `QUANTITIES`, shape (len(cases),), on each case's own grid; NaN where its masks do not show it.

    Volumes are areas times the distance of slices, as core laboratories sum discs. The thickness of a slice is the
    difference of the radii of the circles with the areas inside the outer and inside the inner border, and a heart's
    the mean of its slices.
    """
    rows = np.array([_of(case) for case in cases], np.float64).reshape(-1, len(QUANTITIES))
    return dict(zip(QUANTITIES, rows.T, strict=True))


def _of(case: Case) -> tuple[float, float, float, float]:
    pixel_mm2 = float(case.spacing_mm[1] * case.spacing_mm[2])
    slice_ml = pixel_mm2 * float(case.spacing_mm[0]) / MM3_PER_ML
    cavity = np.count_nonzero(case.masks == LV, axis=(2, 3))
    muscle = np.count_nonzero(case.masks[ED] == MYO, axis=(1, 2))
    known = np.isfinite(ejection_fraction(case.masks))  # else a phase has no cavity, or slices without one that has it
    ed, es = (slice_ml * cavity[phase].sum() if known else np.nan for phase in (ED, ES))
    walled = (cavity[ED] > 0) & (muscle > 0)
    in_part = (case.masks[ED] == NOT_DRAWN).any() and not muscle[cavity[ED] > 0].all()
    if not walled.any() or in_part:
        return ed, es, np.nan, np.nan
    inner, outer = (np.sqrt(areas[walled] * pixel_mm2 / np.pi) for areas in (cavity[ED], cavity[ED] + muscle))
    return ed, es, DENSITY_G_PER_ML * slice_ml * muscle.sum(), float((outer - inner).mean())
