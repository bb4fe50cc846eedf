"""im2col (GEMM) convolutions: one matrix product over all patches of a batch.

The processor's convolutions split their work by images and pixels. The deep layers of a ResNet50 have few of either
(4 x 4 and 2 x 2 pixels of a slice) and many channels, and there one matrix product is several times faster, for
the gradient of the weights most of all. Chellapilla, Puri and Simard (2006), "High performance convolutional neural
networks for document processing", section 2, describe the unfolding.
"""

import itertools
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Im2colConv2d(nn.Conv2d):
    """`nn.Conv2d` of the same parameters and, but for rounding, the same result.

    Square kernels and strides with zero padding (none for a kernel of 1 x 1), no dilation and no groups. Images and
    weights are best in channels last, in which neither has to be copied for a kernel of 1 x 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out_channels, H', W'), in channels last."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(self._patches(input.permute(0, 2, 3, 1)), weight, self.bias).permute(0, 3, 1, 2)

    def _patches(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H', W', rows x columns of the kernel x C)."""
        size, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        if size == 1:
            return pixels[:, ::stride, ::stride]
        pixels = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        rows, columns = (length - size + 1 for length in pixels.shape[1:3])
        shifts = itertools.product(range(size), repeat=2)
        return torch.cat([pixels[:, i : i + rows : stride, j : j + columns : stride] for i, j in shifts], -1)


def use_im2col(module: nn.Module, max_kernel_size: int) -> None:
    """Replace, in place, every convolution inside `module` that `Im2colConv2d` can compute, up to a kernel size."""
    for name, child in module.named_children():
        if _is_replaceable(child, max_kernel_size):
            (size, _), (stride, _), padding = child.kernel_size, child.stride, child.padding[0]
            replacement = Im2colConv2d(
                child.in_channels, child.out_channels, size, stride, padding, bias=child.bias is not None
            )
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement)
        else:
            use_im2col(child, max_kernel_size)


def _is_replaceable(module: nn.Module, max_kernel_size: int) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d or module.kernel_size[0] > max_kernel_size:
        return False
    square = all(len({*shape}) == 1 for shape in (module.kernel_size, module.stride, module.padding))
    padded = module.kernel_size[0] > 1 or module.padding == (0, 0)
    return square and padded and module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
