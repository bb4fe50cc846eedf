"""What a network that nobody has to download sees in a slice: the encoder of the segmenter that ships."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedcmr.server.evaluation.fidelity.samples import Samples
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter
from fedcmr.shared.views import Grid, resampled

ENCODER = ("conv_0", "down_1", "down_2", "down_3", "down_4")
"""Levels of MONAI's U-Net, finest first: texture in the fine ones, parts of the heart in the coarse ones."""
BATCH = 64
NO_SPREAD = 1e-6

Float = NDArray[np.float64]
Key = TypeVar("Key")


@torch.inference_mode()
def encoder_features(segmenter: Segmenter, samples: Samples, grid: Grid) -> Float:
    """The mean over the image of every channel of the encoder, which sees the samples on the segmenter's grid.

    Args:
        segmenter: A U-Net, in evaluation mode, on the CPU.
        samples: Slice pairs on `grid`.
        grid: Of the samples.

    Returns:
        Shape (P, S, D).
    """
    own = segmenter.architecture.grid
    images = samples.images.flatten(0, 1)
    if own != grid:
        # Black, which is -1 here, lies beyond the edge.
        images = resampled(images + 1, (grid.pixel_mm,) * 2, (own.size_px,) * 2, (own.pixel_mm,) * 2) - 1
    parts = []
    for batch in images.split(BATCH):
        levels, x = [], batch
        for name in ENCODER:
            x = segmenter.network.get_submodule(name)(x)
            levels.append(x.mean(dim=(2, 3)))
        parts.append(torch.cat(levels, dim=1))
    features = torch.cat(parts).double()
    return features.reshape(*samples.images.shape[:2], features.shape[1]).numpy()


def standardised(groups: Mapping[Key, Float], reference: Sequence[Key]) -> dict[Key, Float]:
    """Features with mean 0 and SD 1 over the groups that are the reference; those that are constant there become 0.

    Args:
        groups: Each of shape (P, S, D).
        reference: Keys of the real groups: the scale must not depend on what is judged.
    """
    known = np.concatenate([groups[name].reshape(-1, groups[name].shape[-1]) for name in reference])
    mean, sd = known.mean(axis=0), known.std(axis=0)
    scale = np.where(sd > NO_SPREAD, 1 / np.maximum(sd, NO_SPREAD), 0)
    return {name: (values - mean) * scale for name, values in groups.items()}
