"""The autoencoder of a latent space (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.1)."""

import torch
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

KL_WEIGHT = 1e-6
CHANNELS, SIDE = 8, 4


class Autoencoder(nn.Module):
    """MONAI's, between ED/ES images and latents a quarter of their side, standardised by channel.

    Attributes:
        channels: Number of channels of the latents.
        side: How many times smaller a side of the latents is than one of the images.
        mean: Shape (1, 8, 1, 1), mean of latents before they are standardised; `std` likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.side = CHANNELS, SIDE
        self.network = AutoencoderKL(
            spatial_dims=2,
            in_channels=2,
            out_channels=2,
            num_res_blocks=(1, 1, 1),
            channels=(32, 64, 64),
            attention_levels=(False, False, False),
            latent_channels=CHANNELS,
            norm_num_groups=16,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(1, CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, CHANNELS, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """(N, 2, H, W) in [-1, 1] -> (N, 8, H / 4, W / 4)."""
        return (self._latent(images)[0] - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 8, H / 4, W / 4) -> (N, 2, H, W) in [-1, 1]."""
        return self.network.decode(latents * self.std + self.mean).float().clamp(-1, 1)

    def loss(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Absolute error of the images, and the latents' divergence from a normal distribution.

        Args:
            images: Shape (N, 2, H, W) in [-1, 1].
            rng: A generator of the CPU, the source of the latents' noise.

        Returns:
            Shape (N,). Not averaged.
        """
        mean, std = self._latent(images)
        noise = torch.randn(mean.shape, generator=rng).to(mean.device)
        divergence = 0.5 * (mean.square() + std.square() - 2 * std.log() - 1).sum(dim=(1, 2, 3))
        decoded = self.network.decode(mean + std * noise).float()
        return (decoded - images).abs().mean(dim=(1, 2, 3)) + KL_WEIGHT * divergence

    @torch.no_grad()
    def standardise(self, images: Tensor, batch_size: int = 32) -> None:
        """Bring the latents of these images to mean 0 and standard deviation 1."""
        latents = torch.cat([self._latent(part)[0] for part in images.split(batch_size)])
        self.mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))

    def _latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' distribution, before they are standardised."""
        mean, std = self.network.encode(images.contiguous(memory_format=torch.channels_last))
        return mean.float(), std.float()
