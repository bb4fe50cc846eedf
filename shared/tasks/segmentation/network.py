"""The public segmenter: a small U-Net that finds ventricles and muscle on ED/ES pairs of short-axis slices."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from fedcmr.shared import checkpoint as checkpoints
from fedcmr.shared.case import LV
from fedcmr.shared.device import autocast
from fedcmr.shared.errors import UserError
from fedcmr.shared.resources import resource

SHIPPED_SEGMENTER = resource("shared/weights/segmenter.safetensors")
FORMAT = "fedcmr-segmenter-1"
NUM_LABELS = LV + 1
FEATURES = (16, 16, 32, 64, 128, 16)
PREDICT_BATCH = 128


class Segmenter(nn.Module):
    """MONAI's U-Net on ED/ES pairs: both phases at once, because the one helps to find the other's borders.

    The order is known to it as it is to a reader: where trabeculae are pressed together, the border that is drawn lies
    further outside the bright blood (`fedcmr.server.generation.rendering` renders it so).
    """

    def __init__(self) -> None:
        super().__init__()
        network = BasicUNet(spatial_dims=2, in_channels=2, out_channels=2 * NUM_LABELS, features=FEATURES, norm="batch")
        # With bf16 autocast a training step is 2.9 times faster than in float32 and the usual layout (AVX512-BF16).
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every label in every pixel.

        Args:
            images: Shape (N, 2, 64, 64), float32 in [-1, 1], ED and ES.

        Returns:
            Shape (N, 2, 4, 64, 64): phase, label; the largest is the prediction.
        """
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        return logits.reshape(len(images), 2, NUM_LABELS, *images.shape[-2:])


@torch.inference_mode()
def segment(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Labels of pairs: the mean of the scores of a pair and of its mirror image.

    Args:
        segmenter: In evaluation mode.
        images: Shape (N, 2, 64, 64), float32 in [-1, 1].

    Returns:
        Shape (N, 2, 64, 64), uint8 labels 0..3.
    """
    device = next(segmenter.parameters()).device
    labels = []
    for part in images.split(PREDICT_BATCH):
        with autocast(device):
            batch = part.to(device)
            scores = segmenter(batch).softmax(2) + segmenter(batch.flip(3)).softmax(2).flip(4)
        labels.append(scores.argmax(2).to(torch.uint8).cpu())
    return torch.cat(labels)


def save_segmenter(path: Path, segmenter: Segmenter, metadata: dict[str, Any]) -> None:
    """Write the weights as float16 (half the bytes), atomically, with `metadata` readable in the file's header."""
    state = segmenter.network.state_dict()
    arrays = {
        name: (value.half() if value.is_floating_point() else value).cpu().numpy() for name, value in state.items()
    }
    checkpoints.save(path, arrays, {**metadata, "format": FORMAT})


def load_segmenter(path: Path | None = None) -> Segmenter:
    """Read a file of `save_segmenter`; None for the one that ships with the project.

    Raises:
        UserError: The file is missing, or is not a segmenter of this version.
    """
    path = path or SHIPPED_SEGMENTER
    arrays, metadata = checkpoints.load(path)
    segmenter = Segmenter()
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError
        segmenter.network.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in arrays.items()})
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is not a segmenter of this version: make one with 'fedcmr-server segmenter'") from None
    return segmenter.eval().requires_grad_(False)
