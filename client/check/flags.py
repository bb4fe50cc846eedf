"""What a person should check before a case is used: unusual, but no reason to refuse it."""

import math
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from fedcmr.shared.case import Case, is_heart
from fedcmr.shared.views import grid_of

NEAR_MM = 40.0
"""Distance from the image's middle: a normal left ventricle with its wall, and some of the right one."""
MIN_CHANGE_NEAR = 0.45
"""Share of all change between ED and ES in the middle `LOOKED_AT_MM` that lies near the middle; 0.24 if it lay
anywhere. Measured without masks on 20 ACDC, 3 M&Ms, one Siemens Vida and 18 simulated patients: below in 2 of the 42,
with EF 0.14 and 0.20; in 33 when the image is moved away from the heart by 45 mm, in all when moved by 60 mm."""
LOOKED_AT_MM = 144.0
"""Side of the square in which change is looked for."""
SMOOTHING_MM = 6.0
MAX_OFF_CENTRE_MM = 20.0
"""Distance of the labels' centroid from the image's middle, where `prepare` puts it: more is half a ventricle off."""
MIN_CONTRAST = 0.45
"""Grey values near the middle, 5th to 95th percentile, as a share of the whole range: blood and muscle would differ by
less than half of it. In the same 42 patients it is 0.67 and more but for one with 0.39."""
MIN_SLICES = 6
"""A left ventricle is 7 to 10 cm long and slices are planned 1 cm apart (Kramer et al., JCMR 2020, 22:17): with fewer
than six, base or apex is missing or the steps are coarse."""
MAX_SLICE_SPACING_MM = 12.0
"""The same recommendation is 6 to 8 mm thick slices with gaps to make 10 mm."""
MIN_EF, MAX_EF = 0.10, 0.80
"""Hearts beyond eject as good as nothing or all: rather a missing slice or a wrong phase than a patient."""

FLAGS = {
    "no-heart-near-middle": "no heart found near the image's middle: is it cut off, or another part of the body?",
    "low-contrast": "low contrast within the heart",
    "few-slices": f"fewer than {MIN_SLICES} slices: do they reach from base to apex?",
    "wide-spacing": f"slices more than {MAX_SLICE_SPACING_MM:.0f} mm apart: is one missing?",
    "ef-at-bound": f"ejection fraction below {MIN_EF:.0%} or above {MAX_EF:.0%}: are phases and masks right?",
}
"""Every code with what it means. What `prepare` noted of the scans comes next to these, by its reason code."""


def flags_of(case: Case) -> list[str]:
    """Codes of `FLAGS` that apply to a case, in their order."""
    return [code for code, applies in _CHECKS.items() if applies(case)]


def _no_heart_near_middle(case: Case) -> bool:
    """The labels' centroid where there are labels, else where ED and ES differ."""
    distance_mm = _distance_mm(case)
    if (heart := is_heart(case.masks)).any():
        rows, columns = np.nonzero(heart.any(axis=(0, 1)))
        down_mm, across_mm = _places_mm(case)
        return math.hypot(down_mm[rows].mean(), across_mm[columns].mean()) > MAX_OFF_CENTRE_MM
    # Bright blood that comes and goes; the lungs' edge moves as much and is dark.
    change = np.abs(case.frames[0] - case.frames[1]) * case.frames.mean(axis=0)
    density = ndimage.gaussian_filter(change.mean(axis=0), [SMOOTHING_MM / pixel_mm for pixel_mm in grid_of(case)])
    looked_at = [np.abs(places_mm) <= LOOKED_AT_MM / 2 for places_mm in _places_mm(case)]
    density, distance_mm = density[np.ix_(*looked_at)], distance_mm[np.ix_(*looked_at)]
    density = np.maximum(density - np.median(density), 0.0)
    return not density[distance_mm <= NEAR_MM].sum() >= MIN_CHANGE_NEAR * density.sum() > 0


def _low_contrast(case: Case) -> bool:
    """In the middle half of the stack, where the ventricle is widest."""
    num_slices = case.frames.shape[1]
    middle = case.frames[:, num_slices // 4 : max(num_slices // 4 + 1, num_slices - num_slices // 4)]
    low, high = np.percentile(middle[..., _distance_mm(case) <= NEAR_MM], (5, 95))
    return bool(high - low < MIN_CONTRAST)


def _distance_mm(case: Case) -> np.ndarray:
    """Distance of every pixel from the image's middle, shape (H, W)."""
    down_mm, across_mm = _places_mm(case)
    return np.hypot(down_mm[:, None], across_mm)


def _places_mm(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows and the columns lie, from the image's middle, shapes (H,) and (W,)."""
    down, across = (
        (np.arange(size) - (size - 1) / 2) * pixel_mm
        for size, pixel_mm in zip(case.frames.shape[2:], grid_of(case), strict=True)
    )
    return down, across


_CHECKS: dict[str, Callable[[Case], bool]] = {
    "no-heart-near-middle": _no_heart_near_middle,
    "low-contrast": _low_contrast,
    "few-slices": lambda case: case.frames.shape[1] < MIN_SLICES,
    "wide-spacing": lambda case: bool(case.spacing_mm[0] > MAX_SLICE_SPACING_MM),
    "ef-at-bound": lambda case: not math.isnan(case.info.ef) and not MIN_EF <= case.info.ef <= MAX_EF,
}
