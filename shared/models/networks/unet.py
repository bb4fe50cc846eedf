"""The U-Net of every kind, which reads masks, time and a style vector next to the noisy image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from fedcmr.shared.case import LV, NOT_DRAWN
from fedcmr.shared.models.networks.low_rank import LowRankLinear
from fedcmr.shared.style import MAX_STYLE, STYLE_NAMES
from fedcmr.shared.views import NETWORK_GRID, Grid


@dataclass(frozen=True)
class Architecture:
    """Sizes of the U-Net and the grid of its images, kept with its weights.

    Attributes:
        channels: Channels of each level, finest first.
        num_res_blocks: Residual blocks of each level.
        norm_num_groups: Groups of the group norms.
        patch: Side of the pixel blocks that become channels. With 2 there are a quarter of the positions, measured 3
            times faster at equal width. A latent space has pixels of its own and leaves this out.
        size_px: Height and width of the images.
        pixel_mm: Their in-plane pixel.
        unknown_labels: Whether the network is told which pixels nobody drew (`NOT_DRAWN`); else these are background to
            it, and masks must be whole.
    """

    channels: tuple[int, ...] = (64, 96, 128)
    num_res_blocks: int = 1
    norm_num_groups: int = 16
    patch: int = 2
    size_px: int = NETWORK_GRID.size_px
    pixel_mm: float = NETWORK_GRID.pixel_mm
    unknown_labels: bool = False

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels that have a channel in each frame."""
        return (*range(1, LV + 1), NOT_DRAWN) if self.unknown_labels else tuple(range(1, LV + 1))

    @property
    def grid(self) -> Grid:
        """The grid of the images."""
        return Grid(self.size_px, self.pixel_mm)


class UNet(DiffusionModelUNet):
    """MONAI's diffusion U-Net with the masks as one-hot channels and the style vector in the embedding of the time.

    Args:
        architecture: Its sizes.
        image_channels: Channels of the images or latents that it reads and predicts, before patching.
        patch: Side of the blocks of this that become channels; None for the architecture's.
        reduction: How many times smaller a side of this is than one of the masks.
    """

    def __init__(
        self, architecture: Architecture, image_channels: int = 2, patch: int | None = None, reduction: int = 1
    ):
        channels = architecture.channels
        patch = patch or architecture.patch
        super().__init__(
            spatial_dims=2,
            in_channels=image_channels * patch**2 + 2 * len(architecture.labels) * (patch * reduction) ** 2,
            out_channels=image_channels * patch**2,
            channels=channels,
            attention_levels=(False,) * len(channels),
            num_res_blocks=architecture.num_res_blocks,
            norm_num_groups=architecture.norm_num_groups,
            num_class_embeds=1,
        )
        self.patch, self.reduction, self.labels = patch, reduction, architecture.labels
        self.to(memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous_after_frozen_layers)
        # MONAI adds a class embedding to the time embedding; a style vector is a class with coordinates.
        width = 4 * channels[0]
        self.class_embedding = nn.Sequential(
            LowRankLinear(len(STYLE_NAMES), width, seed=1), nn.SiLU(), LowRankLinear(width, width, seed=2)
        )

    def forward(self, x_t: Tensor, t: Tensor, masks: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        """What the kind of the model has it predict.

        Args:
            x_t: Shape (N, C, h, w), h and w divisible by 4 times `patch`.
            t: Shape (N,), in [0, 1].
            masks: Shape (N, 2, H, W), uint8 labels 0..3 and perhaps 255, H = h * `reduction`.
            style: Shape (N, K), standardised style vectors.

        Returns:
            Shape (N, C, h, w).
        """
        labels = torch.cat([(masks == label).to(x_t.dtype) for label in self.labels], dim=1)
        packed = torch.cat(
            [F.pixel_unshuffle(x_t, self.patch), F.pixel_unshuffle(labels, self.patch * self.reduction)], dim=1
        )
        packed = packed.contiguous(memory_format=torch.channels_last)
        # The sinusoidal embedding expects timesteps in 0..1000.
        out = super().forward(packed, t * 1000, class_labels=style.clamp(-MAX_STYLE, MAX_STYLE))
        return F.pixel_shuffle(out, self.patch)


def _contiguous_after_frozen_layers(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """On channels_last input PyTorch's CPU backward pass (2.13) crashes where only a norm's weight wants a gradient."""
    (x,) = inputs
    crashes = torch.is_grad_enabled() and norm.weight.requires_grad and not x.requires_grad
    return (x.contiguous(),) if crashes else None
