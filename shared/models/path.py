"""The linear path from noise to image, and the steps along it.

Liu et al. (2023), https://arxiv.org/abs/2209.03003: `x_t = (1 - t) x_0 + t x_1`, `x_0` Gaussian noise, `x_1` an image
or what stands for it in a latent space.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, C, H, W), t (N,)) -> velocity (N, C, H, W), float32."""


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """The linear path; `t` has shape (N,)."""
    t = t[:, None, None, None]
    return (1 - t) * x_0 + t * x_1


@torch.no_grad()
def integrate(velocity: Velocity, x: Tensor, t_start: float, num_steps: int) -> Tensor:
    """Follow the velocity from `x` at `t_start` to 1 (two-step Adams-Bashforth).

    Args:
        velocity: Velocity of the path, a function of `x_t` and `t`.
        x: Shape (N, C, H, W), the point at `t_start`.
        t_start: In [0, 1).
        num_steps: Calls of `velocity`.

    Returns:
        Shape (N, C, H, W), without limits.
    """
    previous: Tensor | None = None
    for t, t_next in itertools.pairwise(torch.linspace(t_start, 1, num_steps + 1).tolist()):
        slope = velocity(x, torch.full((len(x),), t, device=x.device))
        # Two-step Adams-Bashforth: second order at one call per step.
        step = slope if previous is None else 1.5 * slope - 0.5 * previous
        x = x + (t_next - t) * step
        previous = slope
    return x
