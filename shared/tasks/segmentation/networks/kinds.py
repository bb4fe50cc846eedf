"""The networks that `segmentation.network` names. A new one is a module here and one line below."""

from collections.abc import Callable

from monai.networks.nets import BasicUNet, MedNeXt
from torch import nn

from fedcmr.shared.tasks.segmentation.networks.mmnet import MMNet

Builder = Callable[[int, int, int], nn.Module]
"""From channels of the images, channels of the scores, and the width of the finest level."""


def unet(in_channels: int, out_channels: int, width: int) -> nn.Module:
    """MONAI's U-Net: Ronneberger et al. 2015, arXiv:1505.04597, with batch normalisation; four halvings."""
    features = (width, width, 2 * width, 4 * width, 8 * width, width)
    return BasicUNet(
        spatial_dims=2, in_channels=in_channels, out_channels=out_channels, features=features, norm="batch"
    )


def mednext(in_channels: int, out_channels: int, width: int) -> nn.Module:
    """MONAI's MedNeXt of size S at width 32 (Roy et al. 2023, arXiv:2303.09975), kernels of 3 pixels."""
    return MedNeXt(
        spatial_dims=2,
        init_filters=width,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=3,
        use_residual_connection=True,
    )


def mmnet(in_channels: int, out_channels: int, width: int) -> nn.Module:
    """MMNet, see its module."""
    return MMNet(in_channels, out_channels, width)


NETWORKS: dict[str, Builder] = {"unet": unet, "mednext": mednext, "mmnet": mmnet}
