"""MMNet: a multi-scale, multi-skip network for segmentation of the heart, written after its paper.

Wang, Z., Peng, Y., Li, D. et al. (2021), "MMNet: A multi-scale deep learning network for the left ventricular
segmentation of cardiac MRI images", Applied Intelligence, https://doi.org/10.1007/s10489-021-02720-9. The paper's three
ideas are here: an encoder whose blocks see several scales at once by dilated convolutions, a decoder each level of
which is connected to all levels, and normalisation and activation before each convolution. Widths and rates that the
paper leaves open are ours: rates 1, 2 and 4, and a quarter of the decoder's width from each of the other levels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATES = (1, 2, 4)
"""Dilation of a block's parallel convolutions: 3, 5 and 9 pixels wide."""
NUM_LEVELS = 4


class PreActivation(nn.Sequential):
    """Batch normalisation and ReLU, then a convolution that keeps the size (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, dilation: int = 1) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        )


class MultiScaleBlock(nn.Module):
    """Parallel dilated convolutions, fused by a pointwise one, added to the input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.enter = PreActivation(in_channels, out_channels)
        self.scales = nn.ModuleList(PreActivation(out_channels, out_channels // 2, dilation=rate) for rate in RATES)
        self.fuse = PreActivation(len(RATES) * (out_channels // 2), out_channels, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Shape (N, in_channels, H, W) -> (N, out_channels, H, W)."""
        features = self.enter(features)
        parts = [scale(features) for scale in self.scales]
        return features + self.fuse(torch.cat(parts, dim=1))


class FullScaleDecoder(nn.Module):
    """One level of the decoder: every level of the encoder and every deeper level of the decoder, brought to its size.

    Finer features are reduced by their maximum, coarser ones enlarged bilinearly, each through a convolution of its
    own.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        share = max(out_channels // 4, 8)
        self.enter = nn.ModuleList(PreActivation(channels, share) for channels in in_channels)
        self.fuse = PreActivation(share * len(in_channels), out_channels)

    def forward(self, features: Sequence[Tensor], size: torch.Size) -> Tensor:
        """Features of every level -> shape (N, out_channels, *size)."""
        parts = []
        for enter, level in zip(self.enter, features, strict=True):
            if level.shape[-1] > size[-1]:
                parts.append(enter(F.adaptive_max_pool2d(level, size)))
            else:
                parts.append(F.interpolate(enter(level), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(parts, dim=1))


class MMNet(nn.Module):
    """The network; see the module.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of the scores.
        width: Channels of the finest level; each level below has twice as many.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(NUM_LEVELS)]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(
            MultiScaleBlock(before, after) for before, after in zip([width, *widths], widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            FullScaleDecoder(widths, widths[level]) for level in reversed(range(NUM_LEVELS - 1))
        )
        self.head = PreActivation(width, out_channels, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every channel.

        Args:
            images: Shape (N, in_channels, H, W); H and W are multiples of 8.

        Returns:
            Shape (N, out_channels, H, W).
        """
        features = self.stem(images)
        levels = []
        for number, block in enumerate(self.encoder):
            features = block(features if number == 0 else F.max_pool2d(features, 2))
            levels.append(features)
        for level, decode in zip(reversed(range(NUM_LEVELS - 1)), self.decoder, strict=True):
            # The levels below are the decoder's own by now: each replaces the encoder's of its size.
            features = decode(levels, levels[level].shape[-2:])
            levels[level] = features
        scores: Tensor = self.head(features)
        return scores
