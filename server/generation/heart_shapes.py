"""Parametric short-axis hearts -> masks of a stack at ED and ES, and measures from masks.

A heart is a tapered tube of muscle around the LV cavity with a right ventricle leaning on it, seen in slices across
its long axis. From ED to ES the cavity's radius shrinks, the mitral plane moves toward the apex, and the wall thickens
as the muscle keeps its volume and trabeculae close up against it. Not modelled here: papillary muscles (ACDC and M&Ms
count them as cavity; the renderer draws them), the RV outflow tract, twisting.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedcmr.shared.case import ED, ES, LV, MYO, RV
from fedcmr.shared.views import NETWORK_GRID, Grid

NUM_HARMONICS = 3
"""In-plane shape deviates from a circle by angular harmonics of order 2, 3 and 4."""
APICAL_GAIN = 0.15
_NUM_ANGLES = 48
WALL_TAPER = 0.25
RV_END = 0.95
"""How hearts usually are: how much of the wall thins towards the apex, and where the right ventricle has faded out."""


@dataclass(frozen=True)
class Hearts:
    """N hearts; every field is a tensor of shape (N,) unless said otherwise. Lengths in mm, angles in radians.

    Attributes:
        radius: Endocardial radius at ED, widest level.
        length: Base to endocardial apex at ED.
        wall: Wall thickness at ED.
        wall_taper: How much of the wall thins with the cavity's radius towards the apex, as a share.
        septal_bulge: Extra septal thickness as a share of `wall` (asymmetric hypertrophy).
        taper: Exponent of the profile along the long axis: 2 an ellipsoid, larger a bullet.
        harmonics: Shape (N, 3, 2): cosine and sine amplitudes of the radius, orders 2..4, as shares of it.
        axis_tilt: Shape (N, 2): in-plane drift of the axis from base to apex, x and y.
        rv_angle: Direction of the right ventricle in the image; pi is the left, y points down.
        rv_reach: How far the RV reaches out from the LV's outer wall, as a share of the LV's outer radius.
        rv_width: Tangential half width of the RV, as a share of the LV's outer radius.
        rv_shrink: RV size at ES as a share of ED.
        rv_end: Where the RV has faded out, as a share of the long axis.
        scar_angle: Centre of the badly moving territory.
        scar_width: Half width of that territory.
        scar_severity: 0 none, 1 the territory does not move.
        descent: Movement of the mitral plane toward the apex at ES.
        thickening: Growth of the wall's cross-section with its contraction, beyond what shortening gives: trabeculae
            that close up count as wall.
        contraction: Endocardial radius at ES as a share of ED, outside the territory; sets the ejection fraction.
        centre: Shape (N, 2): offset of the heart from the image's centre, x and y.
        stack_start: Where the stack of slices begins, mm below the ED mitral plane; negative in the atrium.
        stack_end: Where the stack ends, mm below the ED mitral plane; beyond `length` it runs past the apex.
    """

    radius: Tensor
    length: Tensor
    wall: Tensor
    wall_taper: Tensor
    septal_bulge: Tensor
    taper: Tensor
    harmonics: Tensor
    axis_tilt: Tensor
    rv_angle: Tensor
    rv_reach: Tensor
    rv_width: Tensor
    rv_shrink: Tensor
    rv_end: Tensor
    scar_angle: Tensor
    scar_width: Tensor
    scar_severity: Tensor
    descent: Tensor
    thickening: Tensor
    contraction: Tensor
    centre: Tensor
    stack_start: Tensor
    stack_end: Tensor

    def __len__(self) -> int:
        return len(self.radius)

    def __getitem__(self, index: slice | Tensor) -> "Hearts":
        return Hearts(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True)
class Distances:
    """Signed distances in mm, negative inside; each of shape (N, S, 2, H, W): hearts, slices, ED and ES.

    Attributes:
        endo: Distance to the LV's endocardium; positive everywhere in a slice beyond the cavity.
        epi: Distance to the LV's outer wall.
        rv: Distance to the right ventricle's cavity, before the LV's wall is subtracted from it.
        atrium: Distance to the left atrium, above the mitral plane; positive everywhere below it.
        angle: Polar angle around the LV's axis, radians.
        pixel_mm: In-plane pixel, a number.
    """

    endo: Tensor
    epi: Tensor
    rv: Tensor
    atrium: Tensor
    angle: Tensor
    pixel_mm: float


def draw_hearts(
    num: int, generator: torch.Generator, num_slices: int, ef: Tensor | None = None, wide: bool = False
) -> Hearts:
    """Random hearts over the range of healthy and diseased shapes (Kawel-Boehm et al. 2020, widened).

    Args:
        num: Number of hearts.
        generator: Source of the draws.
        num_slices: Slices of the stack in which the ejection fraction will be measured.
        ef: Shape (num,), the ejection fractions requested; None draws them uniformly from 0.08 to 0.80.
        wide: Whether hearts also differ as hospitals and their readers do: how slender the apex is drawn and how far it
            reaches, where the contours begin, how much of the muscle's growth at end-systole is drawn as muscle.
    """

    def uniform(low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    def either(usual: tuple[float, float], widely: tuple[float, float]) -> Tensor:
        return uniform(*(widely if wide else usual))

    ef = uniform(0.08, 0.80) if ef is None else ef
    # Dilated hearts eject little, thick ones much; the overlap stays wide so that size alone does not determine the EF.
    dilated = (uniform(0, 1) < 0.4) & (ef < 0.45)
    radius = uniform(23, 37) - 9 * (ef - 0.5) + dilated * uniform(0, 8)
    hypertrophic = uniform(0, 1) < 0.2
    wall = torch.where(hypertrophic, uniform(10, 18), uniform(5, 10)) - 1.0 * (radius - 30) / 8
    radius = torch.where(hypertrophic, radius * 0.9, radius)
    harmonic_size = torch.tensor([0.12 if wide else 0.06, 0.035, 0.02])[:, None] * uniform(0, 1)[:, None, None]
    infarcted = uniform(0, 1) < 0.35
    length = 40 + radius * either((1.3, 2.1), (0.8, 2.4))
    hearts = Hearts(
        radius=radius,
        length=length,
        wall=wall.clamp(4.5, 20),
        wall_taper=uniform(-0.6, 0.8) if wide else torch.full((num,), WALL_TAPER),
        septal_bulge=torch.where(hypertrophic, uniform(0, 0.8), uniform(-0.1, 0.15)),
        taper=either((1.8, 3.0), (1.0, 3.5)),
        harmonics=torch.randn(num, NUM_HARMONICS, 2, generator=generator) * harmonic_size,
        axis_tilt=uniform(-8, 8, 2),
        rv_angle=math.pi + 0.3 + uniform(-0.8, 0.8),
        rv_reach=torch.where(uniform(0, 1) < 0.25, uniform(0.7, 1.2), uniform(0.35, 0.8)),
        rv_width=uniform(0.8, 1.15),
        rv_shrink=either((0.57, 0.92), (0.45, 0.95)),
        rv_end=uniform(0.6, 1.0) if wide else torch.full((num,), RV_END),
        scar_angle=uniform(-math.pi, math.pi),
        scar_width=uniform(0.5, 1.4),
        scar_severity=torch.where(infarcted, uniform(0.3, 1.0), torch.zeros(num)),
        descent=(3 + 12 * ef) * either((0.45, 1.2), (0.2, 2.2)),
        thickening=either((0.1, 0.9), (-0.4, 1.4)),
        contraction=torch.ones(num),
        centre=torch.stack([uniform(0, 21), uniform(-12, 7)], dim=1),
        # Stacks are planned by eye: some begin in the atrium or end in the fat below the apex, some miss a slice.
        stack_start=either((-12, 4), (-14, 24)),
        stack_end=length + either((-4, 12), (-12, 14)),
    )
    return solve_contraction(hearts, ef, num_slices)


def solve_contraction(hearts: Hearts, ef: Tensor, num_slices: int) -> Hearts:
    """Set `contraction` so that each heart ejects `ef` over `num_slices` slices, by bisection on the cavity's areas.

    A heart that cannot reach a high `ef` because its scar stands still gets a milder scar.
    """
    severity = hearts.scar_severity
    values = {field.name: getattr(hearts, field.name) for field in fields(hearts)}
    for _ in range(4):
        # Nothing contracts below 0.02 of its radius or swells above 1.1 times.
        low, high = torch.full_like(ef, 0.02), torch.full_like(ef, 1.1)
        for _ in range(22):
            middle = (low + high) / 2
            reached = _ejection(Hearts(**{**values, "contraction": middle, "scar_severity": severity}), num_slices)
            low = torch.where(reached > ef, middle, low)
            high = torch.where(reached > ef, high, middle)
        missed = (reached - ef).abs() > 0.005
        if not missed.any():
            break
        severity = torch.where(missed, severity * 0.5, severity)
    return Hearts(**{**values, "contraction": (low + high) / 2, "scar_severity": severity})


def slice_positions(hearts: Hearts, num_slices: int) -> Tensor:
    """Evenly spaced slice centres, base first, shape (N, num_slices), mm below the ED mitral plane."""
    share = (torch.arange(num_slices) + 0.5) / num_slices
    return hearts.stack_start[:, None] + (hearts.stack_end - hearts.stack_start)[:, None] * share


def distances(hearts: Hearts, positions: Tensor, grid: Grid = NETWORK_GRID) -> Distances:
    """Signed distances of every pixel of every slice at ED and ES.

    Args:
        hearts: N hearts.
        positions: Shape (N, S), slice centres in mm below the ED mitral plane.
        grid: The pixels.
    """
    axis = (torch.arange(grid.size_px) - (grid.size_px - 1) / 2) * grid.pixel_mm
    share = (positions / hearts.length[:, None])[:, :, None]
    centre = hearts.centre[:, None] + hearts.axis_tilt[:, None] * (share - 0.5)
    x = axis[None, None, None, :] - centre[:, :, 0, None, None]
    y = axis[None, None, :, None] - centre[:, :, 1, None, None]
    angle, r = torch.atan2(y, x), (x**2 + y**2).sqrt()
    parts = [_phase_distances(hearts, positions, angle, r, x, y, phase) for phase in (ED, ES)]
    endo, epi, rv, atrium = (torch.stack(pair, dim=2) for pair in zip(*parts, strict=True))
    return Distances(endo, epi, rv, atrium, angle[:, :, None].expand_as(endo), grid.pixel_mm)


def masks_from(d: Distances) -> Tensor:
    """Labels of shape (N, S, 2, H, W), uint8: 0 background, 1 RV, 2 myocardium, 3 LV cavity."""
    masks = torch.zeros(d.endo.shape, dtype=torch.uint8)
    masks[d.rv < 0] = RV
    masks[d.epi < 0] = MYO
    masks[d.endo < 0] = LV
    # Above the mitral plane there is no ventricle to label.
    masks[(d.atrium < 1e3).any(dim=(-1, -2))] = 0
    return masks


def _levels(hearts: Hearts, positions: Tensor, phase: int) -> tuple[Tensor, Tensor]:
    """Share of the long axis (0 base, 1 apex) at a phase and the axis's shortening; shapes (N, S) and (N, 1)."""
    if phase == ED:
        return positions / hearts.length[:, None], torch.ones(len(hearts), 1)
    descent = torch.minimum(hearts.descent, hearts.length * 0.3)[:, None]
    length = hearts.length[:, None] - descent
    return (positions - descent) / length, length / hearts.length[:, None]


def _radii(hearts: Hearts, positions: Tensor, angle: Tensor, phase: int) -> tuple[Tensor, Tensor, Tensor]:
    """Endocardial and epicardial radius at `angle` (N, S, ...), and the level broadcast to it."""
    extra = (1,) * (angle.ndim - 2)

    def wide(value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *((1,) * (2 - value.ndim)), *extra)

    level, shortening = _levels(hearts, positions, phase)
    level = wide(level)
    profile = _profile(level, wide(hearts.taper))
    shape = torch.ones_like(angle)
    for order in range(NUM_HARMONICS):
        cos, sin = (wide(hearts.harmonics[:, order, k]) for k in (0, 1))
        shape = shape + cos * torch.cos((order + 2) * angle) + sin * torch.sin((order + 2) * angle)
    endo_ed = wide(hearts.radius) * profile * shape
    septal = torch.exp(2.0 * (torch.cos(angle - wide(hearts.rv_angle)) - 1))
    wall = wide(hearts.wall) * (1 + wide(hearts.septal_bulge) * septal) * (1 + wide(hearts.wall_taper) * (profile - 1))
    away = torch.remainder(angle - wide(hearts.scar_angle) + math.pi, 2 * math.pi) - math.pi
    territory = torch.sigmoid((wide(hearts.scar_width) - away.abs()) / 0.15) * wide(hearts.scar_severity)
    wall = wall * (1 - 0.35 * territory)
    # The apical cap: muscle closes below the cavity's end.
    closing = ((1 + wide(hearts.wall / hearts.length) - level) / wide(hearts.wall / hearts.length)).clamp(0, 1).sqrt()
    epi_ed = (endo_ed + wall) * closing
    if phase == ED:
        return endo_ed, epi_ed, level
    # The apex closes further than the base, as it does on the public scans.
    healthy = wide(hearts.contraction) * (1 - APICAL_GAIN * level.clamp(0, 1) ** 2)
    moved = healthy + (1 - healthy) * territory
    endo_es = endo_ed * moved
    thicker = 1 + wide(hearts.thickening) * (1 - moved).clamp(min=0)
    muscle = (epi_ed**2 - endo_ed**2).clamp(min=0) * thicker / wide(shortening.squeeze(1))
    return endo_es, (endo_es**2 + muscle).sqrt(), level


def _profile(level: Tensor, taper: Tensor) -> Tensor:
    """Radius along the long axis as a share of the widest: a little narrower at the base, closed at the apex."""
    z = level.clamp(0, 1)
    return (1 - z**taper).clamp(min=0).sqrt() * (1 - 0.18 * (1 - z) ** 3)


def _ejection(hearts: Hearts, num_slices: int) -> Tensor:
    """Ejection fraction by the sum of areas over the slices, shape (N,)."""
    positions = slice_positions(hearts, num_slices)
    angle = torch.linspace(-math.pi, math.pi, _NUM_ANGLES + 1)[:-1].expand(len(hearts), num_slices, -1)
    volumes = []
    for phase in (ED, ES):
        endo, _, level = _radii(hearts, positions, angle, phase)
        volumes.append((endo**2 * (level >= 0)).mean(dim=2).sum(dim=1))
    return 1 - volumes[ES] / volumes[ED]


def _phase_distances(
    hearts: Hearts, positions: Tensor, angle: Tensor, r: Tensor, x: Tensor, y: Tensor, phase: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Endo, epi, RV and atrium distances of one phase, each (N, S, H, W)."""
    endo, epi, level = _radii(hearts, positions, angle, phase)
    far = torch.full_like(r, 1e4)
    above = (level < 0).expand_as(r)
    inside = (level >= 0) & (level < 1)
    endo_distance = torch.where(inside, r - endo, far)
    atrium = torch.where(above, r - endo * 1.05, far)
    epi_distance = torch.where(above, r - endo * 1.05 - 2.5, r - epi)
    # The RV is an ellipse whose far side lies `rv_reach` beyond the LV's wall and which fades out before the apex.
    outer = (hearts.radius + hearts.wall)[:, None, None, None]
    size = hearts.rv_shrink[:, None, None, None] if phase == ES else torch.ones(())
    end = hearts.rv_end[:, None, None, None]
    fade = (1 - (level / end).clamp(0, 1) ** 3).sqrt() * (1 + 0.1 * (1 - level.clamp(0, 1)))
    reach = hearts.rv_reach[:, None, None, None] * outer * fade * size
    radial = (reach + outer * 0.9 * fade) / 2
    offset = epi.mean(dim=(2, 3), keepdim=True) * 0.98 + reach - radial
    cos, sin = (f(hearts.rv_angle)[:, None, None, None] for f in (torch.cos, torch.sin))
    along, across = x * cos + y * sin - offset, -x * sin + y * cos
    tangential = hearts.rv_width[:, None, None, None] * outer * fade * (0.5 + 0.5 * size)
    rho = ((along / radial.clamp(min=1)) ** 2 + (across / tangential.clamp(min=1)) ** 2).sqrt()
    rv = torch.where(fade > 0.1, (rho - 1) * torch.minimum(radial, tangential), far)
    return endo_distance, epi_distance, rv, atrium
