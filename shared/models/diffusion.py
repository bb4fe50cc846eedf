"""Diffusion in pixels: the network predicts the noise (Ho et al. 2020, https://arxiv.org/abs/2006.11239, Eq. 14).

With the cosine schedule of Nichol and Dhariwal (2021), https://arxiv.org/abs/2102.09672, at which an image is `cos a`
and the noise `sin a` strong. The point of the linear path with as much noise to its image is the same but for a factor,
so that the one sampler serves: a step along the velocity is one of DDIM (Song et al. 2021,
https://arxiv.org/abs/2010.02502).
"""

import math

from torch import Tensor

from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.networks.unet import Architecture, UNet
from fedcmr.shared.models.path import interpolate


class Diffusion(GenerativeModel):
    """The U-Net predicts the noise that was added."""

    t_min = 0.02
    """At 0 the noise says nothing of an image."""

    def __init__(self, architecture: Architecture | None = None):
        architecture = architecture or Architecture()
        super().__init__(architecture, UNet(architecture))

    def loss_at(self, images: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Tensor:
        """See `GenerativeModel.loss_at`; `t` is the schedule's: even steps of the angle."""
        angle = (1 - t) * (math.pi / 2)
        time = angle.cos() / (angle.cos() + angle.sin())  # where the linear path has as much noise to its image
        predicted = self._noise(interpolate(noise, images, time), time, condition)
        return (predicted - noise).square().mean(dim=(1, 2, 3))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `GenerativeModel.velocity`: from the image that the predicted noise implies, within its limits."""
        predicted = self._noise(x_t, t, condition)
        t = t[:, None, None, None]
        denoised = ((x_t - (1 - t) * predicted) / t).clamp(-1, 1)
        return (denoised - x_t) / (1 - t)

    def _noise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network predicts; it reads images whose variance stays the same on the way."""
        scale = (t.square() + (1 - t).square()).sqrt()[:, None, None, None]
        return self.unet(x_t / scale, t, condition.masks, condition.style).float()
