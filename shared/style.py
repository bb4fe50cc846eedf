"""The public style encoder: a patient's scans -> a short vector of what the scanner made of the tissues.

No parameter is learnt, so the encoder costs no privacy. The style vector says how bright, how even and how sharp the
regions are; its private statistics are what a site may release, and the generator is conditioned on it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.shared.case import LV, MYO, NOT_DRAWN, RV, is_heart
from fedcmr.shared.views import PIXEL_MM

STYLE_NAMES = (
    "lv_mean",
    "myo_mean",
    "rv_mean",
    "band_mean",
    "background_mean",
    "lv_std",
    "myo_std",
    "band_std",
    "background_std",
    "edge_sharpness",
    "noise_level",
)
"""Means and standard deviations of regions in grey values, endocardial edge strength over contrast, fine noise."""

MEAN_KEY, STD_KEY = "code_mean", "code_std"
"""Groups of arrays in checkpoints and published generators: each vendor's mean and standard deviation. The names are
those of the first version: all versions' files are read alike, and `tests/test_recorded_weights.py` hashes them."""

BAND_MM = 10.0
"""Width of the peri-cardiac band."""
MAX_STYLE = 5.0
"""Standardised style vectors are limited to +- this before they reach the generator."""


@dataclass(frozen=True)
class StyleDistribution:
    """A normal distribution over standardised style vectors.

    A vendor's mean and std are what its sites released; the correlation is the public prior's, because how its entries
    go together (both bloods are bright at once) is physics, and a private correlation matrix would cost more than a
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
        """Draw style vectors, shape (num, K)."""
        noise = torch.randn(num, len(self.mean), generator=generator)
        correlated = noise @ torch.linalg.cholesky(self.correlation).T
        return (self.mean + self.std * correlated).clamp(-MAX_STYLE, MAX_STYLE)


def style_moments(raw_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (K,), std (K,) and correlation (K, K) of raw style vectors (N, K) without a NaN."""
    known = raw_vectors[raw_vectors.isfinite().all(1)]
    # A hundredth toward independence keeps the matrix positive definite however few the hearts.
    correlation = 0.99 * torch.corrcoef(known.T) + 0.01 * torch.eye(known.shape[1])
    return known.mean(0), known.std(0), correlation


def style_vector(images: Tensor, masks: Tensor, pixel_mm: float = PIXEL_MM) -> Tensor:
    """Raw style vector of one patient, averaged over its slices and both frames.

    Args:
        images: Shape (N, 2, H, W), float32 in [-1, 1].
        masks: Shape (N, 2, H, W), uint8 labels 0..3 and 255 (`NOT_DRAWN`).
        pixel_mm: In-plane pixel. Sharpness and noise are those of the pixels: vectors of two grids do not compare.

    Returns:
        Shape (K,), in the order of `STYLE_NAMES`; NaN where the patient does not have the region, or nobody drew it.
    """
    return style_vectors(images[None], masks[None], pixel_mm)[0]


def regions(masks: Tensor, pixel_mm: float = PIXEL_MM) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LV cavity, myocardium, RV cavity, the peri-cardiac band and the background.

    Args:
        masks: Shape (N, C, H, W), uint8 labels 0..3 and 255 (`NOT_DRAWN`).
        pixel_mm: In-plane pixel.

    Returns:
        Five tensors of the masks' shape, bool, of which exactly one is true in every pixel that is drawn, and none in
        the others.
    """
    heart = is_heart(masks)
    band_px = round(BAND_MM / pixel_mm)
    near = F.max_pool2d(heart.float(), 2 * band_px + 1, stride=1, padding=band_px) > 0
    drawn = masks != NOT_DRAWN
    return masks == LV, masks == MYO, masks == RV, near & ~heart & drawn, ~near & drawn


def style_vectors(images: Tensor, masks: Tensor, pixel_mm: float = PIXEL_MM) -> Tensor:
    """`style_vector` of B patients at once: (B, N, 2, H, W) -> (B, K)."""
    batch, height, width = len(images), *images.shape[-2:]
    flat = images.reshape(-1, 1, height, width)
    labels = masks.reshape(-1, 1, height, width)
    lv, myo, rv, band, background = regions(labels, pixel_mm)

    def per_patient(values: Tensor, region: Tensor) -> Tensor:
        """Mean over a region of all of a patient's images, shape (B,); NaN for an empty region."""
        weights = region.reshape(batch, -1).float()
        return (values.reshape(batch, -1) * weights).sum(1) / weights.sum(1)

    def spread(region: Tensor) -> Tensor:
        """Standard deviation over a region."""
        mean = per_patient(flat, region)
        return (per_patient(flat**2, region) - mean**2).clamp(min=0).sqrt()

    slope_y, slope_x = torch.gradient(flat, dim=(2, 3))
    cavity = lv.float()
    inner = -F.max_pool2d(-cavity, 3, stride=1, padding=1)
    outer = F.max_pool2d(cavity, 3, stride=1, padding=1)
    # A border is sharp by both its sides: where nobody drew the muscle, the cavity's side alone says too little.
    beside_unknown = F.max_pool2d((labels == NOT_DRAWN).float(), 3, stride=1, padding=1) > 0
    border = ((outer - inner) > 0) & (lv | myo) & ~beside_unknown
    lv_mean, myo_mean = per_patient(flat, lv), per_patient(flat, myo)
    edge_sharpness = per_patient((slope_x**2 + slope_y**2).sqrt(), border) / (lv_mean - myo_mean).clamp(min=0.1)
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).reshape(1, 1, 3, 3) / 6
    # Responds to pixel noise and not to straight edges (Immerkaer 1996, https://doi.org/10.1006/cviu.1996.0060).
    noise_level = per_patient(F.conv2d(flat, kernel, padding=1).abs(), myo | band)
    means = [lv_mean, myo_mean, *(per_patient(flat, region) for region in (rv, band, background))]
    return torch.stack(
        [*means, *(spread(region) for region in (lv, myo, band, background)), edge_sharpness, noise_level], dim=1
    )
