"""Random geometry and appearance for a batch of ED/ES pairs, vectorised, every draw from one generator.

A network trained on generated hearts is tested on other scanners: contrast, sharpness, noise and coil shading
vary here more widely than between vendors, so that none of them carries the ejection fraction.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.server.settings import AugmentationConfig
from fedcmr.shared.views import warp

BLUR_RADIUS = 3
"""Half-width of the blur kernel in pixels: three standard deviations of a strong blur."""
BIAS_GRID = 4
"""Control points of the smooth bias field along each axis."""


def augment_pairs(
    images: Tensor, augmentation: AugmentationConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Transform every pair of a batch its own way; both phases of a pair share all but the noise.

    Args:
        images: Shape (N, 2, H, W), ED and ES, float32 in [-1, 1].
        augmentation: Range of each transform.
        generator: Generator on the CPU, so that equal seeds give equal images on every device.

    Returns:
        The images, shape (N, 2, H, W) in [-1, 1], and the factor by which areas grew, shape (N,).
    """
    device = images.device

    def uniform(limit: float, *shape: int) -> Tensor:
        return ((torch.rand(len(images), *shape, generator=generator) * 2 - 1) * limit).to(device)

    angle = uniform(math.radians(augmentation.rotation_deg))
    scale = torch.exp(uniform(augmentation.log_scale))
    shift = uniform(augmentation.shift_px, 2)
    mirror = torch.where(uniform(1.0, 2) < 0, -1.0, 1.0) if augmentation.flip else torch.ones_like(shift)
    intensities = (warp(images, angle, scale, shift, mirror) + 1) / 2

    intensities = intensities.clamp(0, 1) ** torch.exp(uniform(augmentation.log_gamma))[:, None, None, None]
    gain, offset = 1 + uniform(augmentation.contrast), uniform(augmentation.brightness)
    intensities = (intensities - 0.5) * gain[:, None, None, None] + 0.5 + offset[:, None, None, None]
    if augmentation.log_bias > 0:
        field = torch.randn(len(images), 1, BIAS_GRID, BIAS_GRID, generator=generator) * augmentation.log_bias
        smooth = F.interpolate(field.to(device), images.shape[-2:], mode="bicubic", align_corners=True)
        intensities = intensities * torch.exp(smooth)
    if augmentation.blur_px > 0:
        intensities = blur(intensities, uniform(augmentation.blur_px).abs())
    if augmentation.noise > 0:
        noise = torch.randn(images.shape, generator=generator).to(device)
        intensities = intensities + noise * uniform(augmentation.noise).abs()[:, None, None, None]
    return intensities.clamp(0, 1) * 2 - 1, scale**2


def blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """Gaussian blur, each image with its own standard deviation in pixels; 0 leaves it as it is.

    Args:
        images: Shape (N, C, H, W).
        sigma_px: Shape (N,).
    """
    num, channels, height, width = images.shape
    x = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    kernel = torch.softmax(-(x**2) / (2 * sigma_px.clamp(min=1e-2)[:, None] ** 2), dim=1)
    kernel = kernel.repeat_interleave(channels, 0)[:, None]
    padded = F.pad(images, (BLUR_RADIUS,) * 4, mode="replicate").reshape(1, num * channels, *_padded(height, width))
    rows = F.conv2d(padded, kernel[:, :, :, None], groups=num * channels)
    return F.conv2d(rows, kernel[:, :, None, :], groups=num * channels).reshape(images.shape)


def _padded(height: int, width: int) -> tuple[int, int]:
    return height + 2 * BLUR_RADIUS, width + 2 * BLUR_RADIUS
