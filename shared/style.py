"""The public appearance encoder: a patient's scans -> a short code of what the scanner made of the tissues.

No parameter is learnt, so the encoder costs no privacy. The code says how bright, how even and how sharp the regions
are; it is what a site may release as private moments, and what the generator is conditioned on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.case import LV, MYO, RV

STYLE_NAMES = (
    "lv_mean",
    "myo_mean",
    "rv_mean",
    "ring_mean",
    "far_mean",
    "lv_std",
    "myo_std",
    "ring_std",
    "far_std",
    "edge",
    "grain",
)
"""Means and standard deviations of regions in picture units, endocardial edge strength over contrast, fine grain."""

RING_PX = 5
"""Width of the ring around the heart, in pixels of the networks' grid (2 mm each)."""
MAX_STYLE = 5.0
"""Standardised codes are limited to +- this before they reach the generator."""


@dataclass(frozen=True)
class StyleDistribution:
    """A normal distribution over standardised appearance codes.

    A vendor's mean and std are what its sites released; the correlation is the public prior's, because how the codes go
    together (both bloods are bright at once) is physics, and a private correlation matrix would cost more than a
    hospital's patients can pay.

    Attributes:
        mean: Shape (K,).
        std: Shape (K,), positive.
        correlation: Shape (K, K), positive definite, ones on the diagonal.
    """

    mean: Tensor
    std: Tensor
    correlation: Tensor

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw codes, shape (num, K)."""
        noise = torch.randn(num, len(self.mean), generator=generator)
        correlated = noise @ torch.linalg.cholesky(self.correlation).T
        return (self.mean + self.std * correlated).clamp(-MAX_STYLE, MAX_STYLE)


def style_moments(raw_codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (K,), std (K,) and correlation (K, K) of raw codes (N, K), patients with a NaN left out."""
    known = raw_codes[raw_codes.isfinite().all(1)]
    # A hundredth toward independence keeps the matrix positive definite however few the hearts.
    correlation = 0.99 * torch.corrcoef(known.T) + 0.01 * torch.eye(known.shape[1])
    return known.mean(0), known.std(0), correlation


def style_vector(images: Tensor, masks: Tensor) -> Tensor:
    """Raw appearance code of one patient, averaged over its slices and both frames.

    Args:
        images: Shape (N, 2, H, W), float32 in [-1, 1].
        masks: Shape (N, 2, H, W), uint8 labels 0..3.

    Returns:
        Shape (K,), in the order of `STYLE_NAMES`; NaN where the patient lacks the region.
    """
    return style_vectors(images[None], masks[None])[0]


def regions(masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LV cavity, myocardium, RV cavity, the ring around the heart and what lies beyond it.

    Args:
        masks: Shape (N, C, H, W), uint8 labels 0..3.

    Returns:
        Five tensors of the masks' shape, bool, of which exactly one is true in every pixel.
    """
    heart = masks > 0
    near = F.max_pool2d(heart.float(), 2 * RING_PX + 1, stride=1, padding=RING_PX) > 0
    return masks == LV, masks == MYO, masks == RV, near & ~heart, ~near


def style_vectors(images: Tensor, masks: Tensor) -> Tensor:
    """`style_vector` of B patients at once: (B, N, 2, H, W) -> (B, K)."""
    batch, height, width = len(images), *images.shape[-2:]
    pictures = images.reshape(-1, 1, height, width)
    labels = masks.reshape(-1, 1, height, width)
    lv, myo, rv, ring, far = regions(labels)

    def per_patient(values: Tensor, region: Tensor) -> Tensor:
        """Mean over a region of all of a patient's pictures, shape (B,); NaN for an empty region."""
        weights = region.reshape(batch, -1).float()
        return (values.reshape(batch, -1) * weights).sum(1) / weights.sum(1)

    def spread(region: Tensor) -> Tensor:
        """Standard deviation over a region."""
        mean = per_patient(pictures, region)
        return (per_patient(pictures**2, region) - mean**2).clamp(min=0).sqrt()

    slope_y, slope_x = torch.gradient(pictures, dim=(2, 3))
    cavity = lv.float()
    inner = -F.max_pool2d(-cavity, 3, stride=1, padding=1)
    outer = F.max_pool2d(cavity, 3, stride=1, padding=1)
    border = ((outer - inner) > 0) & (lv | myo)
    lv_mean, myo_mean = per_patient(pictures, lv), per_patient(pictures, myo)
    edge = per_patient((slope_x**2 + slope_y**2).sqrt(), border) / (lv_mean - myo_mean).clamp(min=0.1)
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).reshape(1, 1, 3, 3) / 6
    # Responds to pixel noise and not to straight edges (Immerkaer 1996, https://doi.org/10.1006/cviu.1996.0060).
    grain = per_patient(F.conv2d(pictures, kernel, padding=1).abs(), myo | ring)
    means = [lv_mean, myo_mean, *(per_patient(pictures, region) for region in (rv, ring, far))]
    return torch.stack([*means, *(spread(region) for region in (lv, myo, ring, far)), edge, grain], dim=1)
