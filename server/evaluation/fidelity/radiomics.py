"""Radiomics features of slices: first-order statistics and texture, in the whole image and in each structure.

A set of its own in NumPy, with the definitions of the Image Biomarker Standardisation Initiative (Zwanenburg et al.
2020, https://doi.org/10.1148/radiol.2020191145) for what has one. A whole image has texture as a structure has; shape
is not among them, because volumes and thickness are compared by themselves.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.evaluation.fidelity.samples import Region, Samples
from fedcmr.shared.case import ED, ES

GREY = 255.0
"""The grey level of 1 in a case's frames: logarithms of features need a scale, and this is the one of 8-bit images."""
LEVELS = 16
"""Bins of fixed width for entropy and the co-occurrence of grey levels."""
OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1))
FIRST_ORDER = ("mean", "sd", "p10", "median", "p90", "skewness", "kurtosis", "entropy", "gradient", "laplacian")
TEXTURE = ("contrast", "dissimilarity", "homogeneity", "energy", "joint_entropy", "correlation")
NUM_FEATURES = len(FIRST_ORDER) + len(TEXTURE)
"""Of one region in one phase."""
TINY = 1e-12

Float = NDArray[np.float64]


def radiomics(samples: Samples, regions: Sequence[Region]) -> Float:
    """The features of every slice pair, log-transformed: sign(x) log(1 + |x|).

    Returns:
        Shape (P, S, (2 + len(regions)) * `NUM_FEATURES`): the whole image at ED and at ES, then the regions.
    """
    num, slices = samples.images.shape[:2]
    images = ((samples.images.flatten(0, 1) + 1) / 2).clamp(0, 1).double().numpy()
    masks = samples.masks.flatten(0, 1).numpy()
    blocks = [features_within(images[:, phase], np.ones_like(masks[:, phase], bool)) for phase in (ED, ES)]
    blocks += [features_within(images[:, phase], masks[:, phase] == label) for phase, label in regions]
    values = np.concatenate(blocks, axis=1)
    return (np.sign(values) * np.log1p(np.abs(values))).reshape(num, slices, values.shape[1])


def features_within(images: Float, within: NDArray[np.bool_]) -> Float:
    """`FIRST_ORDER` and `TEXTURE` of each image's region.

    Args:
        images: Shape (N, H, W) in [0, 1].
        within: Shape (N, H, W); every region has a pixel.

    Returns:
        Shape (N, `NUM_FEATURES`); grey levels are those of 0..255.
    """
    reach = [np.flatnonzero(within.any(axis=axes))[[0, -1]] for axes in ((0, 2), (0, 1))] if within.any() else []
    # With a neighbour on every side, which gradients need; the rest costs time alone.
    window = np.s_[:, *(slice(max(0, first - 1), last + 2) for first, last in reach)]
    images, within = images[window], within[window]
    levels = np.minimum((images * LEVELS).astype(np.int64), LEVELS - 1)
    return np.concatenate([_first_order(images * GREY, levels, within), _texture(levels, within)], axis=1)


def _first_order(grey: Float, levels: NDArray[np.int64], within: NDArray[np.bool_]) -> Float:
    num, size = len(grey), grey.shape[1] * grey.shape[2]
    flat, inside = grey.reshape(num, size), within.reshape(num, size)
    counts = inside.sum(axis=1)

    def mean_of(values: Float) -> Float:
        return (values.reshape(num, size) * inside).sum(axis=1) / counts

    mean = mean_of(flat)
    deviation = flat - mean[:, None]
    square = deviation * deviation  # far faster than powers
    variance = mean_of(square)
    sd = np.sqrt(variance)
    skewness = mean_of(square * deviation) / np.maximum(sd**3, TINY)
    kurtosis = mean_of(square * square) / np.maximum(variance**2, TINY)
    ranked = np.sort(np.where(inside, flat, np.inf).astype(np.float32), axis=1)
    p10, median, p90 = (ranked[np.arange(num), ((counts - 1) * q).round().astype(int)] for q in (0.1, 0.5, 0.9))
    bins = np.arange(num)[:, None] * LEVELS + levels.reshape(num, size)
    shares = np.bincount(bins[inside], minlength=num * LEVELS).reshape(num, LEVELS) / counts[:, None]
    rows, columns = np.gradient(grey, axis=(1, 2))
    gradient = mean_of(np.hypot(rows, columns))
    edged = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    laplacian = edged[:, 2:, 1:-1] + edged[:, :-2, 1:-1] + edged[:, 1:-1, 2:] + edged[:, 1:-1, :-2] - 4 * grey
    roughness = np.sqrt(mean_of(laplacian * laplacian))
    return np.stack([mean, sd, p10, median, p90, skewness, kurtosis, _entropy(shares), gradient, roughness], axis=1)


def _texture(levels: NDArray[np.int64], within: NDArray[np.bool_]) -> Float:
    """Haralick's features of the symmetric co-occurrence of grey levels at distance 1, of all directions together."""
    num, height, width = levels.shape
    counts = np.zeros((num, LEVELS, LEVELS))
    of_image = np.arange(num)[:, None, None] * LEVELS**2
    for down, right in OFFSETS:
        first = np.s_[:, : height - down, max(0, -right) : width - max(0, right)]
        second = np.s_[:, down:, max(0, right) : width - max(0, -right)]
        both = within[first] & within[second]
        places = (of_image + levels[first] * LEVELS + levels[second])[both]
        counts += np.bincount(places, minlength=num * LEVELS**2).reshape(counts.shape)
    counts += counts.transpose(0, 2, 1)
    shares = counts / np.maximum(counts.sum(axis=(1, 2), keepdims=True), 1)
    i, j = np.mgrid[:LEVELS, :LEVELS]
    mean = (shares * i).sum(axis=(1, 2))
    variance = (shares * (i - mean[:, None, None]) ** 2).sum(axis=(1, 2))
    covariance = (shares * (i - mean[:, None, None]) * (j - mean[:, None, None])).sum(axis=(1, 2))
    return np.stack(
        [
            (shares * (i - j) ** 2).sum(axis=(1, 2)),
            (shares * np.abs(i - j)).sum(axis=(1, 2)),
            (shares / (1 + (i - j) ** 2)).sum(axis=(1, 2)),
            (shares**2).sum(axis=(1, 2)),
            _entropy(shares.reshape(num, LEVELS**2)),
            np.where(variance > TINY, covariance / np.maximum(variance, TINY), 1.0),
        ],
        axis=1,
    )


def _entropy(shares: Float) -> Float:
    """In bits; shape (N, B) -> (N,)."""
    return -(shares * np.log2(np.maximum(shares, TINY))).sum(axis=1)
