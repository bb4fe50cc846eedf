"""Schedules of a training: the learning rate, and the decay of the weights' average.

Schedules are functions of (step, done): the steps taken before this one, and the share of the budget used by then, in
[0, 1). Where a training may end by the clock, `done` runs ahead of the steps.
"""

import math
from collections.abc import Callable

WARM_UP_SHARE, FIRST_FACTOR, LAST_FACTOR = 0.25, 1 / 25, 1e-4

Schedule = Callable[[int, float], float]


def one_cycle(step: int, num_steps: int, peak: float) -> float:
    """The learning rate of a step: one cycle with cosine ramps.

    Smith & Topin (2018), https://arxiv.org/abs/1708.07120, in the shape of `torch.optim.lr_scheduler.OneCycleLR`.
    """
    first, last = peak * FIRST_FACTOR, peak * FIRST_FACTOR * LAST_FACTOR
    top = WARM_UP_SHARE * num_steps - 1
    if step <= top:
        return peak + (first - peak) * (1 + math.cos(math.pi * step / max(top, 1e-9))) / 2
    return last + (peak - last) * (1 + math.cos(math.pi * (step - top) / max(num_steps - 1 - top, 1))) / 2


def cosine(step: int, done: float, peak: float, num_warm_up_steps: int) -> float:
    """The learning rate of a step: a linear warm-up, and a cosine that reaches 0 where the budget is used up."""
    return peak * min(1.0, (step + 1) / num_warm_up_steps) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(limit: float, num_averaged: int) -> float:
    """Decay of the weights' average after so many steps: small at first, so that the first weights are forgotten."""
    return min(limit, (1 + num_averaged) / (10 + num_averaged))
