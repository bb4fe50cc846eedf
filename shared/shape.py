"""A heart as a short vector of shape: from its contours at end-diastole and end-systole, and what lies within them.

Nothing is learnt, so the encoder costs no privacy. The vector says how a patient's heart differs from what the public
hearts are at the same ejection fraction; its private statistics say what the hearts of a hospital look like, and how
its readers draw them, and the server draws synthetic hearts from that population.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, Case
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.trabeculae import dark_shares

GEOMETRY_NAMES = (
    "lv_radius",
    "lv_length",
    "fullness",
    "ellipticity",
    "wall",
    "wall_taper",
    "septum",
    "thickening",
    "shortening",
    "apical_emptying",
    "rv_size",
    "rv_emptying",
    "rv_extent",
)
SHAPE_NAMES = (*GEOMETRY_NAMES, "dark_ed", "dark_es")
"""Entries of a raw shape vector, in this order. Slices are those that hold the cavity of the left ventricle at
end-diastole, in thirds from base to apex; a thickness is that of the ring of muscle around a disc of the cavity's area.
All but the last two follow from the contours alone.

- lv_radius: logarithm of the cavity's largest radius at end-diastole, that of a disc of its area, in mm;
- lv_length: logarithm of the length of the slices, in mm;
- fullness: mean of the radii over the largest one;
- ellipticity: logarithm of the ratio of the cavity's principal axes, in the middle third;
- wall: logarithm of the muscle's thickness in the middle third, in mm;
- wall_taper: logarithm of the ratio of the thickness in the apical third to that in the basal one;
- septum: logarithm of the ratio of the muscle within 45 degrees of the right ventricle to that opposite, in the middle;
- thickening: logarithm of the ratio of the thickness at end-systole to that at end-diastole, in the middle third;
- shortening: share of the slices that hold no cavity at end-systole;
- apical_emptying: ejection fraction of the apical half minus that of the basal half;
- rv_size: logarithm of the ratio of the right ventricle's volume to that of the left one with its muscle;
- rv_emptying: ejection fraction of the right ventricle;
- rv_extent: logarithm of the ratio of the number of slices with a right ventricle to that of the slices;
- dark_ed, dark_es: share of the cavity that is trabeculae and papillary muscles (`fedcmr.shared.trabeculae`)."""

SHAPE_STD = "shape_std"
"""Beside the mean (`fedcmr.shared.records.SHAPE_MEAN`), the group of arrays in checkpoints and published generators."""
MAX_SHAPE = 4.0
"""Entries of standardised shape vectors are limited to +- this."""
MIN_SLICES = 3
"""With fewer slices that hold the cavity there is no base, middle and apex."""
MIN_WALL_MM = 1.0

EXPECTED = (
    (3.292, 4.327, 0.838, 0.148, 2.076, -0.042, 0.089, 0.440, 0.076, -0.087, -0.996, 0.415, -0.234, 0.285, 0.391),
    (-0.417, -0.264, -0.005, 0.012, 0.292, -0.032, 0.026, 0.885, 0.150, -0.123, -0.070, 0.029, -0.039, 0.060, 0.370),
    (-0.223, -0.093, -0.028, 0.007, 0.175, -0.076, -0.085, 0.209, 0.003, 0.485, -0.108, -0.064, -0.183, 0.0, 0.0),
)
"""Raw shape vectors of the widely drawn simulated hearts at an ejection fraction of 0.5, how they change with it, and
how with the square of its distance from 0.5: least squares over 1,500 hearts. The last two: of 59 patients of ACDC."""
SPREAD = (0.154, 0.246, 0.049, 0.119, 0.376, 0.151, 0.192, 0.124, 0.084, 0.123, 0.408, 0.232, 0.187, 0.077, 0.076)
"""Standard deviations of the rest."""


@dataclass(frozen=True)
class ShapeDistribution:
    """A vendor's population: standardised shape vectors as its sites released them.

    Attributes:
        mean: Shape (K,).
        std: Shape (K,), positive.
    """

    mean: Tensor
    std: Tensor


def geometry_vectors(masks: Tensor, spacing_mm: Tensor) -> Tensor:
    """The geometry of N hearts whose stacks have equally many slices.

    Args:
        masks: Shape (N, 2, Z, H, W), uint8 labels at ED and ES, 0..3 and 255 (`NOT_DRAWN`); base or apex first.
        spacing_mm: Shape (N, 3): distance of slices, rows and columns.

    Returns:
        Shape (N, 13), float64, in the order of `GEOMETRY_NAMES`; NaN where something that an entry needs was not drawn
        or is not there.
    """
    slice_mm, row_mm, column_mm = spacing_mm.double().T[:, :, None]
    unknown = (masks == NOT_DRAWN).flatten(2).any(dim=2)
    areas = {label: (masks == label).sum(dim=(3, 4)) * (row_mm * column_mm)[:, None] for label in (RV, MYO, LV)}
    flipped = _apex_is_first(areas[LV][:, ED], areas[RV][:, ED])
    areas = {label: torch.where(flipped[:, None, None], area.flip(2), area) for label, area in areas.items()}
    at_ed = torch.where(flipped[:, None, None, None], masks[:, ED].flip(1), masks[:, ED])
    lv, muscle, rv = areas[LV], areas[MYO], areas[RV]

    held = lv[:, ED] > 0
    number = held.sum(dim=1)
    place = (held.cumsum(dim=1) - 0.5) / number[:, None]
    basal, middle, apical = (held & (place > k / 3) & (place < (k + 1) / 3) for k in range(3))
    radius = (lv / math.pi).sqrt()
    largest = radius[:, ED].amax(dim=1)
    thickness = ((lv + muscle) / math.pi).sqrt() - radius
    has_muscle = muscle > 0

    def wall(phase: int, where: Tensor) -> Tensor:
        """Logarithm of the mean thickness where there is muscle."""
        return _mean(thickness[:, phase], where & has_muscle[:, phase]).clamp(min=MIN_WALL_MM).log()

    def emptied(volumes: Tensor) -> Tensor:
        """The ejection fraction of volumes at ED and ES, shape (N, 2)."""
        return 1 - volumes[:, ES] / volumes[:, ED]

    apex = (held & (place > 0.5))[:, None]
    base = ~apex
    has_cavity_at_es = (lv[:, ES] > 0).any(dim=1)
    # Where something was not drawn, it may be the right ventricle.
    rv_at_ed = (rv[:, ED] > 0).any(dim=1) & ~unknown[:, ED]
    rv_at_both = rv_at_ed & (rv[:, ES] > 0).any(dim=1) & ~unknown[:, ES]
    entries = {
        "lv_radius": largest.log(),
        "lv_length": (number * slice_mm[:, 0]).log(),
        "fullness": _mean(radius[:, ED], held) / largest,
        "ellipticity": _mean(_elongation(at_ed == LV, row_mm, column_mm), middle),
        "wall": wall(ED, middle),
        "wall_taper": wall(ED, apical) - wall(ED, basal),
        "septum": _known(_septum(at_ed, middle), rv_at_ed),
        "thickening": wall(ES, middle) - wall(ED, middle),
        "shortening": _known(1 - (lv[:, ES] > 0).sum(dim=1) / number, has_cavity_at_es),
        "apical_emptying": _known(emptied((lv * apex).sum(dim=2)) - emptied((lv * base).sum(dim=2)), has_cavity_at_es),
        "rv_size": _known((rv[:, ED].sum(dim=1) / (lv + muscle)[:, ED].sum(dim=1)).log(), rv_at_ed),
        "rv_emptying": _known(emptied(rv.sum(dim=2)), rv_at_both),
        "rv_extent": _known(((rv[:, ED] > 0).sum(dim=1) / number).log(), rv_at_ed),
    }
    vectors = torch.stack([entries[name].double() for name in GEOMETRY_NAMES], dim=1)
    return torch.where((number >= MIN_SLICES)[:, None] & vectors.isfinite(), vectors, math.nan)


def standardise_shapes(raw: Tensor, efs: Tensor) -> Tensor:
    """Raw shape vectors relative to the public hearts of the same ejection fraction.

    Args:
        raw: Shape (N, K), or their first entries.
        efs: Shape (N,), in [0, 1].

    Returns:
        The shape of `raw`: 0 as the public hearts are on average, 1 their spread; NaN where a raw entry or `efs` is.
    """
    size = raw.shape[1]
    spread = torch.tensor(SPREAD, dtype=torch.float64)[:size]
    return ((raw - expected_shapes(efs)[:, :size]) / spread).clamp(-MAX_SHAPE, MAX_SHAPE)


def expected_shapes(efs: Tensor) -> Tensor:
    """What public hearts of these ejection fractions have on average, shape (N, K), float64."""
    away = efs.double() - 0.5
    return torch.stack([torch.ones_like(away), away, away**2], dim=1) @ torch.tensor(EXPECTED, dtype=torch.float64)


def case_shape(case: Case, images: Tensor, masks: Tensor) -> Tensor:
    """A case's standardised shape vector, shape (K,), float32; NaN where it cannot be measured.

    Args:
        case: Its own masks and spacing say the geometry.
        images: Its slices on the generator's grid, shape (Z, 2, H, W): how much fine darkness blurs depends on it.
        masks: The same shape.
    """
    geometry = geometry_vectors(torch.from_numpy(case.masks)[None], torch.from_numpy(case.spacing_mm)[None])
    raw = torch.cat([geometry, dark_shares(images[None], masks[None]).double()], dim=1)
    return standardise_shapes(raw, torch.tensor([ejection_fraction(case.masks)]))[0].float()


def _apex_is_first(lv: Tensor, rv: Tensor) -> Tensor:
    """Which stacks run from apex to base, shape (N,): the right ventricle lies, or the wider end is, at the base."""
    place = torch.arange(lv.shape[1], dtype=torch.float64)
    middle = (lv * place).sum(dim=1) / lv.sum(dim=1)
    by_rv = (rv * place).sum(dim=1) / rv.sum(dim=1) > middle
    later = place > middle[:, None]
    by_width = _mean(lv, later & (lv > 0)) > _mean(lv, ~later & (lv > 0))
    return torch.where((rv > 0).any(dim=1), by_rv, by_width)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the second dimension of what is meant, shape (N,); NaN where nothing is."""
    return torch.where(where, values, 0.0).sum(dim=1) / where.sum(dim=1)


def _known(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, math.nan)


def _elongation(region: Tensor, row_mm: Tensor, column_mm: Tensor) -> Tensor:
    """Logarithm of the ratio of the principal axes of each slice's region, (N, Z, H, W) -> (N, Z); empty: 0."""
    inside = region.float()
    y = (torch.arange(region.shape[2]) * row_mm).float()[:, None, :, None]
    x = (torch.arange(region.shape[3]) * column_mm).float()[:, None, None, :]
    size = inside.sum(dim=(2, 3)).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (inside * values).sum(dim=(2, 3)) / size

    mean_y, mean_x = mean(y), mean(x)
    yy, xx, yx = mean(y * y) - mean_y**2, mean(x * x) - mean_x**2, mean(y * x) - mean_y * mean_x
    half, apart = (yy + xx) / 2, ((yy - xx) ** 2 / 4 + yx**2).sqrt()
    pixel_mm2 = (row_mm * column_mm) / 12  # a single pixel is no line
    return 0.5 * ((half + apart + pixel_mm2) / (half - apart + pixel_mm2)).log()


def _septum(labels: Tensor, where: Tensor) -> Tensor:
    """Logarithm of the ratio of the muscle towards the right ventricle to that opposite; (N, Z, H, W) -> (N,)."""
    y = torch.arange(labels.shape[2], dtype=torch.float32)[:, None]
    x = torch.arange(labels.shape[3], dtype=torch.float32)

    def middle(label: int) -> tuple[Tensor, Tensor]:
        inside = (labels == label).float()
        size = inside.sum(dim=(2, 3))  # 0 gives NaN: no direction, and no pixel on either side
        means = ((inside * place).sum(dim=(2, 3)) / size for place in (y, x))
        down, across = (mean[..., None, None] for mean in means)
        return down, across

    (lv_y, lv_x), (rv_y, rv_x) = middle(LV), middle(RV)
    away_y, away_x, axis_y, axis_x = y - lv_y, x - lv_x, rv_y - lv_y, rv_x - lv_x
    cosine = (away_y * axis_y + away_x * axis_x) / (torch.hypot(away_y, away_x) * torch.hypot(axis_y, axis_x))
    muscle = (labels == MYO) & where[..., None, None]
    towards, opposite = (
        (muscle & side).sum(dim=(1, 2, 3)).double() for side in (cosine > math.sqrt(0.5), cosine < -math.sqrt(0.5))
    )
    return (towards / opposite).log()
