"""Matches an image to what was released of a vendor, as far as simple maps can: intensities, noise and trabeculae.

Region by region an affine map of the grey values brings mean and spread to those of the style vector. The guide needs
it because a sampler that starts from a partly noised guide keeps much of its intensities. The generated image needs it,
and noise, because a few large steps of the sampler end near the mean of what could be: little contrast, no noise.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from fedcmr.shared.case import LV
from fedcmr.shared.style import STYLE_NAMES, regions, style_vectors
from fedcmr.shared.trabeculae import grey_levels
from fedcmr.shared.views import PIXEL_MM

MAX_GAIN = 2.5
"""Largest change of contrast, up or down: a flat region is not stretched into noise, nor a textured one flattened."""
STRAND_MM, RAGGED_MM = 5.0, 1.5
"""Size of the bays between trabeculae, and how far their border wanders."""
STRAND_BLOOD = 0.2
"""Share of blood in a pixel of trabeculae."""
_MEANS = ("lv_mean", "myo_mean", "rv_mean", "band_mean", "background_mean")
_STDS = ("lv_std", "myo_std", None, "band_std", "background_std")  # the style vector does not say how even the RV is


def match_intensities(images: Tensor, masks: Tensor, raw_style: Tensor, pixel_mm: float = PIXEL_MM) -> Tensor:
    """Map the grey values of each heart's regions to the means and standard deviations of its style vector.

    Args:
        images: Shape (N, S, 2, H, W), float32 in [-1, 1].
        masks: Shape (N, S, 2, H, W), uint8 labels 0..3.
        raw_style: Shape (N, K), raw style vectors in the order of `STYLE_NAMES`.
        pixel_mm: In-plane pixel.

    Returns:
        Shape (N, S, 2, H, W) in [-1, 1]. A region that a heart does not have is left out.
    """
    num = len(images)
    flat = masks.flatten(0, 1)
    mapped, weights = torch.zeros_like(images), torch.zeros_like(images)
    for region, mean_name, std_name in zip(regions(flat, pixel_mm), _MEANS, _STDS, strict=True):
        inside = region.float().reshape(num, -1)
        size = inside.sum(1).clamp(min=1)
        values = images.reshape(num, -1)
        mean = (values * inside).sum(1) / size
        std = (((values - mean[:, None]) ** 2 * inside).sum(1) / size).sqrt()
        wanted = raw_style[:, STYLE_NAMES.index(mean_name)]
        gain = torch.ones(num)
        if std_name:
            spread = raw_style[:, STYLE_NAMES.index(std_name)].clamp(min=0)
            gain = (spread / std.clamp(min=1e-3)).clamp(1 / MAX_GAIN, MAX_GAIN)
        # Over a border the maps change within two pixels, as partial volume does.
        share = F.avg_pool2d(region.float(), 3, stride=1, padding=1, count_include_pad=False).reshape(images.shape)
        mean, gain, wanted = (x[:, None, None, None, None] for x in (mean, gain, wanted))
        mapped += share * ((images - mean) * gain + wanted)
        weights += share
    return (mapped / weights).clamp(-1, 1)


def match_dark_shares(
    images: Tensor, masks: Tensor, shares: Tensor, rng: torch.Generator, pixel_mm: float = PIXEL_MM
) -> Tensor:
    """Draw trabeculae from the wall inwards, or take some away, until a share of each heart's cavity is dark.

    Args:
        images: Shape (N, S, 2, H, W), float32 in [-1, 1].
        masks: Shape (N, S, 2, H, W), uint8 labels 0..3.
        shares: Shape (N, 2), as `fedcmr.shared.trabeculae.dark_shares` would measure them; NaN leaves a heart as it is.
        rng: Source of the raggedness.
        pixel_mm: In-plane pixel.

    Returns:
        Shape (N, S, 2, H, W) in [-1, 1].
    """
    matched = images.clone()
    size = images.shape[-1]
    cells = max(2, round(size * pixel_mm / STRAND_MM))
    for own, labels, wanted in zip(matched, masks, shares, strict=True):
        coarse = torch.randn(len(own), 2, cells, cells, generator=rng)
        ragged = RAGGED_MM * F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        for phase, level in enumerate(grey_levels(own, labels)):
            if level is None or not wanted[phase].isfinite():
                continue
            blood, muscle = level
            cavity = labels[:, phase] == LV
            depth = torch.from_numpy(np.stack([distance_transform_edt(part.numpy()) for part in cavity])) * pixel_mm
            order = (depth + ragged[:, phase])[cavity]
            values = own[:, phase][cavity]
            dark = values < (blood + muscle) / 2
            missing = round(float(wanted[phase]) * len(values)) - int(dark.sum())
            # Strands grow from the wall; what is too much vanishes anywhere, papillary muscles included.
            candidates = torch.nonzero(~dark if missing > 0 else dark).squeeze(1)
            by_order = order if missing > 0 else ragged[:, phase][cavity]
            changed = candidates[by_order[candidates].argsort()[: abs(missing)]]
            values[changed] = muscle + STRAND_BLOOD * (blood - muscle) if missing > 0 else blood
            own[:, phase][cavity] = values
    return matched


def match_noise(
    images: Tensor, masks: Tensor, raw_style: Tensor, rng: torch.Generator, pixel_mm: float = PIXEL_MM
) -> Tensor:
    """Add white noise up to the noise level of each heart's style vector; an image that has it already stays.

    Args:
        images: Shape (N, S, 2, H, W), float32 in [-1, 1].
        masks: Shape (N, S, 2, H, W), uint8 labels 0..3.
        raw_style: Shape (N, K), raw style vectors in the order of `STYLE_NAMES`.
        rng: Source of the noise.
        pixel_mm: In-plane pixel.

    Returns:
        Shape (N, S, 2, H, W) in [-1, 1].
    """
    level = STYLE_NAMES.index("noise_level")
    has = torch.nan_to_num(style_vectors(images, masks, pixel_mm)[:, level])
    # Mean absolute values of normal noise, whose squares add up; the encoder's filter keeps its standard deviation.
    missing = (raw_style[:, level].clamp(min=0) ** 2 - has**2).clamp(min=0) * math.pi / 2
    noise = torch.randn(images.shape, generator=rng)
    return (images + missing.sqrt()[:, None, None, None, None] * noise).clamp(-1, 1)
