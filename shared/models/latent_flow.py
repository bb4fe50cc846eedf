"""Conditional flow matching between latents of an autoencoder.

Rombach et al. (2022), https://arxiv.org/abs/2112.10752, for the latent space; the loss and the path are those of
`flow_matching.py`.
"""

from torch import Tensor

from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.flow_matching import flow_matching_loss
from fedcmr.shared.models.networks.autoencoder import Autoencoder
from fedcmr.shared.models.networks.unet import Architecture, UNet


class LatentFlow(GenerativeModel):
    """The U-Net predicts the velocity of the path between noise and latents, a quarter of the image's side."""

    autoencoder: Autoencoder

    def __init__(self, architecture: Architecture | None = None):
        architecture = architecture or Architecture()
        autoencoder = Autoencoder()
        unet = UNet(architecture, autoencoder.channels, patch=1, reduction=autoencoder.side)
        super().__init__(architecture, unet, autoencoder)

    def loss_at(self, images: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Tensor:
        """See `GenerativeModel.loss_at`; nothing flows back into the autoencoder."""
        x_0, x_1 = self.as_noise(noise), self.encode(images)
        return flow_matching_loss(lambda x_t, time: self.velocity(x_t, time, condition), x_0, x_1, t)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `GenerativeModel.velocity`."""
        return self.unet(x_t, t, condition.masks, condition.style).float()
