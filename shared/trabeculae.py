"""How much of the cavity looks like muscle: trabeculae and papillary muscles, which readers count as cavity.

At end-systole they close up. A network that reads ejection fractions sees the bright blood and is told the reader's
areas; how far the two differ is a matter of scanner, resolution and reader, and part of what a hospital's hearts are.
"""

import math

import torch
from torch import Tensor

from fedcmr.shared.case import LV, MYO

BRIGHT = 0.8
"""Quantile of the cavity's grey values that is blood in any heart."""


def dark_shares(images: Tensor, masks: Tensor) -> Tensor:
    """Share of the cavity's pixels that are darker than halfway between blood and muscle, at ED and ES.

    Args:
        images: Shape (N, S, 2, H, W), grey values; S slices of each of N hearts.
        masks: The same shape, uint8 labels 0..3 and 255.

    Returns:
        Shape (N, 2), in [0, 1]; NaN where a heart has no cavity in the phase, or no muscle was drawn in either.
    """
    shares = torch.full((len(images), 2), math.nan)
    for index, (own, labels) in enumerate(zip(images, masks, strict=True)):
        levels = grey_levels(own, labels)
        for phase, level in enumerate(levels):
            cavity = own[:, phase][labels[:, phase] == LV]
            if level is not None:
                shares[index, phase] = (cavity < sum(level) / 2).float().mean()
    return shares


def grey_levels(images: Tensor, masks: Tensor) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Grey values of one heart's blood and muscle at ED and ES; None for a phase without a cavity, or without muscle.

    Args:
        images: Shape (S, 2, H, W).
        masks: The same shape.
    """
    muscle = [images[:, phase][masks[:, phase] == MYO] for phase in (0, 1)]
    # Where muscle was drawn at one phase only, it is as bright at the other.
    known = [values if len(values) else other for values, other in zip(muscle, muscle[::-1], strict=True)]
    found: list[tuple[float, float] | None] = []
    for phase in (0, 1):
        cavity = images[:, phase][masks[:, phase] == LV]
        found.append(
            (float(torch.quantile(cavity, BRIGHT)), float(known[phase].median()))
            if len(cavity) and len(known[phase])
            else None
        )
    return found[0], found[1]
