"""Conditional flow matching: the path, the loss and the sampler.

Lipman et al. (2023), https://arxiv.org/abs/2210.02747, with the linear path of Liu et al. (2023),
https://arxiv.org/abs/2209.03003: `x_t = (1 - t) x_0 + t x_1`, `x_0` Gaussian noise, `x_1` a picture.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t (N, 2, H, W), t (N,), masks (N, 2, H, W), code (N, K)) -> velocity (N, 2, H, W)."""


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """The linear path; `t` has shape (N,)."""
    t = t[:, None, None, None]
    return (1 - t) * x_0 + t * x_1


def flow_matching_loss(
    velocity: Velocity, images: Tensor, masks: Tensor, code: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Conditional flow-matching loss, one value per picture (Lipman et al. 2023, Eq. 23 with the linear path).

    Args:
        velocity: The generator.
        images: Shape (N, 2, H, W), ED and ES, float32 in [-1, 1].
        masks: Shape (N, 2, H, W), uint8 labels 0..3.
        code: Shape (N, K), standardised appearance codes.
        t: Shape (N,), in [0, 1).
        noise: Shape (N, 2, H, W), standard normal.

    Returns:
        Shape (N,). Not averaged: the caller averages per patient before clipping.
    """
    predicted = velocity(interpolate(noise, images, t), t, masks, code)
    return (predicted.float() - (images - noise)).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def sample(
    velocity: Velocity, masks: Tensor, code: Tensor, sketch: Tensor, noise: Tensor, start_t: float, num_steps: int
) -> Tensor:
    """Integrate the velocity from the partly noised sketch at `start_t` to 1 (two-step Adams-Bashforth).

    Args:
        velocity: The generator.
        masks: Shape (N, 2, H, W), uint8 labels 0..3.
        code: Shape (N, K).
        sketch: Shape (N, 2, H, W) in [-1, 1], a rough picture of the same masks (SDEdit, Meng et al. 2022,
            https://arxiv.org/abs/2108.01073); without weight at `start_t` 0.
        noise: Shape (N, 2, H, W), standard normal.
        start_t: In [0, 1); 0 samples from pure noise.
        num_steps: Calls of the generator.

    Returns:
        Shape (N, 2, H, W), in [-1, 1].
    """
    return integrate(velocity, masks, code, sketch, noise, start_t, num_steps).clamp(-1, 1)


@torch.no_grad()
def integrate(
    velocity: Velocity, masks: Tensor, code: Tensor, sketch: Tensor, noise: Tensor, start_t: float, num_steps: int
) -> Tensor:
    """`sample` without its limits, for pictures that are no pixels."""
    times = torch.linspace(start_t, 1, num_steps + 1).tolist()
    x = interpolate(noise, sketch, torch.full((len(masks),), start_t))
    previous: Tensor | None = None
    for t, t_next in itertools.pairwise(times):
        slope = velocity(x, torch.full((len(masks),), t), masks, code).float()
        # Two-step Adams-Bashforth: second order at one call per step.
        step = slope if previous is None else 1.5 * slope - 0.5 * previous
        x = x + (t_next - t) * step
        previous = slope
    return x
