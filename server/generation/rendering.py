"""Renders simulated hearts with randomised appearance: the public prior's images, and the sampler's guides.

Appearance is drawn far wider than any scanner's (the SynthSeg idea, Billot et al. 2023,
https://arxiv.org/abs/2107.09559), so that real ones lie inside. Modelled: blood, muscle, papillary muscles,
trabeculae, epicardial and chest-wall fat, lung with vessels, liver and stomach below, partial volume, uneven inflow,
blur, coil shading, noise. Not modelled: the scanner's k-space, banding, the thorax's true anatomy. The simulated
hospitals share no code with this file, so that no hospital repeats the prior.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.server.generation.heart_shapes import Distances, Hearts
from fedcmr.shared.views import IMAGE_SIZE, PIXEL_MM

FIELD_MM = IMAGE_SIZE * PIXEL_MM
"""Field of view in which a smooth field has the number of bumps that is said here; a wider one has more."""


class _Dice:
    """Random numbers per heart (the same for all its slices), per slice, or per pixel."""

    def __init__(self, num_hearts: int, num_slices: int, size: int, pixel_mm: float, generator: torch.Generator):
        self.shape = (num_hearts, num_slices, size)
        self.pixel_mm = pixel_mm
        self.generator = generator

    def heart(self, low: float, high: float) -> Tensor:
        """Uniform, one value per heart; shape (N, 1, 1, 1, 1)."""
        return low + (high - low) * torch.rand(self.shape[0], 1, 1, 1, 1, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
        """True with `probability`, one value per heart."""
        return self.heart(0, 1) < probability

    def field(self, cells: int, per_phase: bool = False) -> Tensor:
        """A smooth standard-normal field with about `cells` bumps in 128 mm; shape (N, S, 1 or 2, H, W)."""
        num_hearts, num_slices, size = self.shape
        cells = max(1, round(cells * size * self.pixel_mm / FIELD_MM))
        phases = 2 if per_phase else 1
        coarse = torch.randn(num_hearts * num_slices, phases, cells, cells, generator=self.generator)
        # Neighbouring slices show the same surroundings: half of a field is common to the stack.
        common = torch.randn(num_hearts, 1, phases, cells, cells, generator=self.generator)
        common = common.expand(-1, num_slices, -1, -1, -1).reshape_as(coarse)
        mixed = 0.8 * common + 0.6 * coarse
        smooth = F.interpolate(mixed, size=(size, size), mode="bicubic", align_corners=False)
        return smooth.reshape(num_hearts, num_slices, phases, size, size)


def render(hearts: Hearts, d: Distances, generator: torch.Generator) -> Tensor:
    """Render hearts.

    Args:
        hearts: N hearts.
        d: Their distances, (N, S, 2, H, W).
        generator: Source of every draw.

    Returns:
        Shape (N, S, 2, H, W), float32 in [-1, 1], scaled per heart by percentiles as prepared scans are.
    """
    num_hearts, num_slices, _, size, _ = d.endo.shape
    dice = _Dice(num_hearts, num_slices, size, d.pixel_mm, generator)
    image = _thorax(hearts, d, dice)
    image = _heart(hearts, image, d, dice)
    return _scan(image, dice)


def _ed_es(ed: float, es: float) -> Tensor:
    """One value per phase, broadcast over (N, S, 2, H, W)."""
    return torch.tensor([ed, es]).reshape(1, 1, 2, 1, 1)


def _soft(distance: Tensor, width: Tensor | float) -> Tensor:
    """Share of a pixel inside a surface at signed `distance` mm, with a soft edge of `width` mm."""
    return torch.sigmoid(-distance / width * 2.2)


def _mix(below: Tensor, above: Tensor | float, share: Tensor) -> Tensor:
    return below + (above - below) * share


def _thorax(hearts: Hearts, d: Distances, dice: _Dice) -> Tensor:
    """Surroundings, (N, S, 2, H, W): lung, chest wall by the RV, organs below, all with wavy borders."""
    size = dice.shape[2]
    axis = (torch.arange(size) - (size - 1) / 2) * dice.pixel_mm
    turn = (hearts.rv_angle - math.pi)[:, None, None, None, None] + dice.heart(-0.5, 0.5)
    x = axis * torch.cos(turn) + axis[:, None] * torch.sin(turn)
    y = -axis * torch.sin(turn) + axis[:, None] * torch.cos(turn)

    lung = dice.heart(0.0, 0.16) * (1 + 0.3 * dice.field(10))
    vessels = _soft(1.9 - dice.field(18), 0.5) * dice.heart(0.1, 0.6)
    image = lung + vessels
    # Liver, stomach and diaphragm under the inferior wall: patches of different brightness with sharp borders.
    patches = (
        dice.heart(0.05, 0.6)
        + (dice.field(5) > 0.3) * dice.heart(-0.3, 0.5)
        + (dice.field(4) > 0.6) * dice.heart(-0.3, 0.6)
    )
    patches = patches + 0.06 * dice.field(16)
    diaphragm = dice.heart(12, 55) + 8 * dice.field(4) + dice.heart(-0.3, 0.3) * x
    image = _mix(image, patches, _soft(diaphragm - y, 3.0))
    # Muscle and bright fat of the chest wall, toward the sternum (left and top).
    lean = dice.heart(0.0, 1.2)
    toward_wall = -x * torch.cos(lean) - y * torch.sin(lean)
    wall = toward_wall - dice.heart(38, 75) - 5 * dice.field(4)
    muscle = dice.heart(0.1, 0.35) * (1 + 0.2 * dice.field(12))
    fat = dice.heart(0.4, 1.15) * (1 + 0.15 * dice.field(8))
    layer = dice.heart(3, 12)
    image = _mix(image, muscle, _soft(-wall, 2.0))
    image = _mix(image, fat, _soft(layer - wall, 2.0))
    image = _mix(image, dice.heart(0.0, 0.05), _soft(layer + dice.heart(12, 60) - wall, 2.0))
    # A bright vessel or two (aorta, vena cava, liver veins) somewhere next to the heart.
    for _ in range(2):
        angle, reach, radius = dice.heart(-math.pi, math.pi), dice.heart(45, 75), dice.heart(3, 11)
        away = ((x - reach * torch.cos(angle)) ** 2 + (y - reach * torch.sin(angle)) ** 2).sqrt()
        image = _mix(image, dice.heart(0.5, 1.0), _soft(away - radius, 2.0) * dice.chance(0.5))
    return image.clamp(min=0).expand(d.endo.shape)


def _heart(hearts: Hearts, image: Tensor, d: Distances, dice: _Dice) -> Tensor:
    """The heart over its surroundings."""
    edge = dice.heart(0.8, 2.4)
    blood = dice.heart(0.65, 1.3)
    muscle = blood * dice.heart(0.1, 0.5)
    rv_blood = muscle + (blood - muscle) * dice.heart(0.45, 1.05)
    inflow = 1 + dice.heart(0.0, 0.2) * dice.field(6, per_phase=True) + dice.heart(0.0, 0.15) * dice.field(3)

    outline = torch.minimum(d.epi, d.rv - dice.heart(1.5, 4.5))
    fat_depth = (dice.heart(-4, 5) + 3.5 * dice.field(6)).clamp(min=0)
    fat = dice.heart(0.3, 1.15)
    image = _mix(image, fat, _soft(outline - fat_depth, edge) * (fat_depth > 0.5))
    # The RV's thin free wall, then its blood with coarse trabeculae toward the apex.
    image = _mix(image, muscle * dice.heart(0.8, 1.3), _soft(outline, edge))
    coarse = _soft(dice.heart(1.0, 2.2) - dice.field(14, per_phase=True), 0.4)
    rv_inner = _mix(rv_blood * inflow, muscle, coarse * dice.heart(0.2, 0.9))
    image = _mix(image, rv_inner, _soft(d.rv, edge))
    texture = 1 + dice.heart(0.0, 0.16) * dice.field(16, per_phase=True) + dice.heart(0.0, 0.12) * dice.field(5)
    image = _mix(image, muscle * texture, _soft(d.epi, edge))
    # Readers draw the cavity's border outside the trabeculae: the bright blood ends a little inside it, raggedly, and
    # more so when contracted.
    inset = (dice.heart(0.4, 3.0) + dice.heart(0.2, 1.5) * dice.field(12, per_phase=True)) * _ed_es(0.9, 1.4)
    ragged = d.endo + inset
    image = _mix(image, blood * inflow, _soft(ragged, edge))
    image = _mix(image, muscle * dice.heart(0.9, 1.15), _papillary(hearts, d, dice) * dice.heart(0.6, 1.0))
    atrium = blood * inflow * dice.heart(0.75, 1.05)
    return _mix(image, atrium, _soft(d.atrium, edge))


def _papillary(hearts: Hearts, d: Distances, dice: _Dice) -> Tensor:
    """Papillary muscles and trabeculae inside the cavity, as shares (N, S, 2, H, W)."""
    cavity = _soft(d.endo, 1.0)
    # Equivalent radius of the cavity per slice and phase places the muscles.
    radius = ((d.endo < 0).sum(dim=(-1, -2), keepdim=True) * d.pixel_mm**2 / math.pi).sqrt()
    depth = -d.endo
    share = torch.zeros_like(d.endo)
    for side in (-1, 1):
        centre = hearts.rv_angle[:, None, None, None, None] + math.pi + side * dice.heart(0.5, 1.25)
        bend = torch.remainder(d.angle - centre + math.pi, 2 * math.pi) - math.pi
        size = dice.heart(2.6, 7.0) * _ed_es(1.0, 1.15)
        stand = size * dice.heart(0.6, 1.3) + _ed_es(0.12, 0.03) * radius
        tangential = (radius - depth).clamp(min=0) * bend
        away = (((depth - stand) / 1.2) ** 2 + tangential**2).sqrt()
        away = torch.where(bend.abs() < 1.5, away, torch.full_like(away, 99.0)) + 1.2 * dice.field(14)
        share = torch.maximum(share, _soft(away - size, 1.6))
    # Trabeculae: ragged strands within a few millimetres of the wall.
    rim = torch.exp(-depth.clamp(min=0) / dice.heart(2.5, 9.0))
    strands = _soft(dice.heart(0.0, 1.3) - dice.field(22, per_phase=True), 0.5) * rim
    return torch.maximum(share, strands * dice.heart(0.4, 1.0)) * cavity


def _scan(image: Tensor, dice: _Dice) -> Tensor:
    """Blur, shading, noise, gamma; scaled per heart to the 1st and 99th percentile and to [-1, 1]."""
    num_hearts, _, _, size, _ = image.shape
    sigma = dice.heart(0.15, 0.8) * (PIXEL_MM / dice.pixel_mm)
    reach = math.ceil(6.0 / dice.pixel_mm)
    taps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma.reshape(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    grouped = image.reshape(num_hearts, -1, size, size).transpose(0, 1)
    grouped = F.conv2d(
        F.pad(grouped, (0, 0, reach, reach), mode="reflect"), kernel[:, None, :, None], groups=num_hearts
    )
    grouped = F.conv2d(
        F.pad(grouped, (reach, reach, 0, 0), mode="reflect"), kernel[:, None, None, :], groups=num_hearts
    )
    image = grouped.transpose(0, 1).reshape(image.shape)

    image = image * torch.exp(dice.heart(0.0, 0.35) * dice.field(2))
    noise = torch.randn(image.shape, generator=dice.generator)
    soft_noise = F.avg_pool2d(noise.flatten(0, 1), 2, stride=1, padding=1)[..., :size, :size].reshape(image.shape) * 2
    level = dice.heart(0.004, 0.045)
    image = (image + level * torch.where(dice.chance(0.5), noise, soft_noise)).abs()
    image = image.clamp(min=1e-4) ** torch.exp(dice.heart(-0.3, 0.3))
    flat = image.reshape(num_hearts, -1)
    low, high = torch.quantile(flat[:, ::7], torch.tensor([0.01, 0.99]), dim=1)
    shape = (num_hearts, 1, 1, 1, 1)
    scaled = (image - low.reshape(shape)) / (high - low).clamp(min=1e-3).reshape(shape)
    return scaled.clamp(0, 1) * 2 - 1
