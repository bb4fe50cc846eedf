"""The segmenter: a network that finds ventricles and muscle on ED/ES pairs of short-axis slices, and its file."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedcmr.shared import checkpoint as checkpoints
from fedcmr.shared.case import LV
from fedcmr.shared.device import autocast
from fedcmr.shared.errors import UserError
from fedcmr.shared.holding import holding
from fedcmr.shared.resources import resource
from fedcmr.shared.tasks.segmentation.networks.kinds import NETWORKS
from fedcmr.shared.views import NETWORK_GRID, Grid

SHIPPED_SEGMENTER = resource("shared/weights/segmenter.safetensors")
FORMAT = "fedcmr-segmenter-1"
NUM_LABELS = LV + 1
TRAINABLE = re.compile(r"upcat_1\.convs\..*\.adn\.N\.|final_conv\.")
PREDICT_PIXELS = 128 * NETWORK_GRID.size_px**2
"""Pixels of a phase in a batch of predictions on a GPU, which bounds the memory."""
CPU_PIXELS = 32 * NETWORK_GRID.size_px**2
"""The same on a CPU, where more are no faster: 130 MiB in each process that looks for hearts, instead of 370."""


@dataclass(frozen=True)
class Architecture:
    """What rebuilds a segmenter; stands in the header of its file.

    Attributes:
        network: A key of `NETWORKS`.
        width: Channels at the finest level.
        size_px: Height and width of the images it is used on.
        pixel_mm: Their in-plane pixel.
    """

    network: str = "unet"
    width: int = 16
    size_px: int = NETWORK_GRID.size_px
    pixel_mm: float = NETWORK_GRID.pixel_mm

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"Expected network in {tuple(NETWORKS)}, got {self.network!r}.")

    @property
    def grid(self) -> Grid:
        """The grid of the images."""
        return Grid(self.size_px, self.pixel_mm)


class Segmenter(nn.Module):
    """A network on ED/ES pairs: both phases at once, because the one helps to find the other's borders.

    The order is known to it as it is to a reader: where trabeculae are pressed together, the border that is drawn lies
    further outside the bright blood (`fedcmr.server.generation.rendering` renders it so).

    Args:
        architecture: By default the shipped segmenter's.

    Attributes:
        elapsed_s: Seconds that its training took, without interruptions; None in one that was not trained here.
    """

    elapsed_s: float | None = None

    def __init__(self, architecture: Architecture = Architecture()) -> None:
        super().__init__()
        self.architecture = architecture
        network: Any = NETWORKS[architecture.network](2, 2 * NUM_LABELS, architecture.width)
        # In this layout a training step is 1.2 times faster on a CPU.
        self.network: nn.Module = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every label in every pixel.

        Args:
            images: Shape (N, 2, H, W), float32 in [-1, 1], ED and ES; H and W are multiples of 16.

        Returns:
            Shape (N, 2, 4, H, W): phase, label; the largest is the prediction.
        """
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        return logits.reshape(len(images), 2, NUM_LABELS, *images.shape[-2:])

    def trainable(self) -> dict[str, nn.Parameter]:
        """What a federation may train, by name, in the order of the names; 200 numbers of the shipped segmenter.

        The affine parameters of the U-Net's last decoder level and the output layer. All else is frozen, because the
        privacy noise grows with the square root of the count of numbers. Running statistics of a normalisation layer
        are no parameters: they stay the public ones.

        Raises:
            ValueError: The network is none of which a federation trains a part.
        """
        if self.architecture.network != "unet":
            raise ValueError(f"Expected a U-Net, got {self.architecture.network!r}.")
        parameters = self.network.named_parameters()
        return {name: parameter for name, parameter in sorted(parameters) if TRAINABLE.match(name)}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
        """See `fedcmr.shared.holding.holding`, for `trainable`."""
        with holding(self, self.trainable(), values) as parameters:
            yield parameters


@torch.inference_mode()
def probabilities(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Probability of every label: the mean over a pair and its mirror image.

    Args:
        segmenter: In evaluation mode.
        images: Shape (N, 2, H, W), float32 in [-1, 1].

    Returns:
        Shape (N, 2, 4, H, W), float32, on the CPU.
    """
    device = next(segmenter.parameters()).device
    pixels = PREDICT_PIXELS if device.type == "cuda" else CPU_PIXELS
    batch_size = max(1, pixels // (images.shape[-2] * images.shape[-1]))
    parts = []
    for part in images.split(batch_size):
        with autocast(device):
            batch = part.to(device)
            sums = segmenter(batch).softmax(2) + segmenter(batch.flip(3)).softmax(2).flip(4)
        parts.append((sums / 2).cpu())
    return torch.cat(parts)


def segment(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Labels of pairs, shape (N, 2, H, W), uint8 0..3: the likeliest of `probabilities`."""
    return probabilities(segmenter, images).argmax(2).to(torch.uint8)


def save_segmenter(path: Path, segmenter: Segmenter, metadata: dict[str, Any]) -> None:
    """Write the weights as float16 (half the bytes), atomically, with `metadata` readable in the file's header."""
    state = segmenter.network.state_dict()
    arrays = {
        name: (value.half() if value.is_floating_point() else value).cpu().numpy() for name, value in state.items()
    }
    header = {**metadata, "format": FORMAT, "architecture": asdict(segmenter.architecture)}
    checkpoints.save(path, arrays, header)


def load_segmenter(path: Path | None = None) -> Segmenter:
    """Read a file of `save_segmenter`; None for the one that ships with the project.

    A file of an earlier version states no architecture: it holds the shipped segmenter's.

    Raises:
        UserError: The file is missing, or is not a segmenter of this version.
    """
    path = path or SHIPPED_SEGMENTER
    arrays, metadata = checkpoints.load(path)
    try:
        if metadata.get("format") != FORMAT:
            raise ValueError
        segmenter = Segmenter(Architecture(**metadata.get("architecture", {})))
        segmenter.network.load_state_dict({name: torch.from_numpy(np.asarray(v)) for name, v in arrays.items()})
    except (RuntimeError, TypeError, ValueError):
        raise UserError(
            f"{path} is not a segmenter of this version: make one with 'fedcmr-server train --task segmentation'"
        ) from None
    return segmenter.eval().requires_grad_(False)


def public_sha256() -> str:
    """SHA-256 of the shipped segmenter's file, in hex: a site and the server compare it before any round."""
    return hashlib.sha256(SHIPPED_SEGMENTER.read_bytes()).hexdigest()
