"""Conditional flow matching in pixels.

Lipman et al. (2023), https://arxiv.org/abs/2210.02747, with the linear path of Liu et al. (2023),
https://arxiv.org/abs/2209.03003.
"""

from torch import Tensor

from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.networks.unet import Architecture, UNet
from fedcmr.shared.models.path import Velocity, interpolate


def flow_matching_loss(velocity: Velocity, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Conditional flow-matching loss, one value per image (Lipman et al. 2023, Eq. 23 with the linear path).

    Args:
        velocity: What is trained.
        x_0: Shape (N, C, H, W), standard normal.
        x_1: Shape (N, C, H, W), where the path ends.
        t: Shape (N,), in [0, 1).

    Returns:
        Shape (N,). Not averaged.
    """
    return (velocity(interpolate(x_0, x_1, t), t) - (x_1 - x_0)).square().mean(dim=(1, 2, 3))


class FlowMatching(GenerativeModel):
    """The U-Net predicts the velocity of the path."""

    def __init__(self, architecture: Architecture | None = None):
        architecture = architecture or Architecture()
        super().__init__(architecture, UNet(architecture))

    def loss_at(self, images: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Tensor:
        """See `GenerativeModel.loss_at`."""
        return flow_matching_loss(lambda x_t, time: self.velocity(x_t, time, condition), noise, images, t)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `GenerativeModel.velocity`."""
        return self.unet(x_t, t, condition.masks, condition.style).float()
