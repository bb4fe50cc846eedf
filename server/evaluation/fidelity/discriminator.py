"""Can a small network tell synthetic hearts from real ones? Its AUC by patient, on patients it has not seen."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from fedcmr.server.evaluation.fidelity.samples import Region, Samples
from fedcmr.server.evaluation.score import CONFIDENCE
from fedcmr.shared.views import Grid

NUM_STEPS = 400
CHANNELS = (16, 32, 64)
BATCH = 32
"""Half real, half synthetic, patients drawn with replacement."""
LEARNING_RATE = 2e-3
NUM_FOLDS = 3
MARGIN_MM = 6.0
"""Around the structures, in the pictures of the heart alone: the border and its neighbourhood belong to it."""

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What the network says of patients whom it has not seen.

    Attributes:
        real: Shape (P,), mean of a patient's slices; larger is more like a synthetic one.
        synthetic: Shape (Q,).
        real_folds: Shape (P,), in which fold each was left out: two networks' scores have no common scale.
        synthetic_folds: Shape (Q,).
    """

    real: Float
    synthetic: Float
    real_folds: NDArray[np.int64]
    synthetic_folds: NDArray[np.int64]


def heart_alone(samples: Samples, regions: list[Region], grid: Grid) -> Tensor:
    """Images that are 0, a middle grey, outside the regions and `MARGIN_MM` around them.

    Returns:
        Shape (P, S, 2, H, W).
    """
    near = np.zeros(samples.masks.shape, bool)
    for phase, label in regions:
        near[:, :, phase] |= samples.masks[:, :, phase].numpy() == label
    reach = round(MARGIN_MM / grid.pixel_mm)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (np.hypot(y, x) <= reach)[None, None, None]
    return torch.where(torch.from_numpy(ndimage.binary_dilation(near, disc)), samples.images, 0.0)


def cross_fitted(real: Tensor, synthetic: Tensor, seed: int, num_steps: int = NUM_STEPS) -> Scores:
    """Train a network on all but one fold of the patients, score the fold, and so on for every fold.

    Args:
        real: Shape (P, S, 2, H, W), at least `NUM_FOLDS` patients.
        synthetic: Shape (Q, S, 2, H, W).
        seed: Of folds, weights and batches; equal seeds give equal scores.
        num_steps: Of each network.
    """
    rng = torch.Generator().manual_seed(seed)
    groups = (real, synthetic)
    folds = [torch.randperm(len(group), generator=rng) % NUM_FOLDS for group in groups]
    scores = [torch.zeros(len(group)) for group in groups]
    for fold in range(NUM_FOLDS):
        network = _train([group[of != fold] for group, of in zip(groups, folds, strict=True)], rng, num_steps)
        with torch.inference_mode():
            for group, of, score in zip(groups, folds, scores, strict=True):
                left_out = group[of == fold]
                answers = network(left_out.flatten(0, 1)).reshape(left_out.shape[:2])
                score[of == fold] = answers.mean(dim=1)
    (of_real, of_synthetic), (fold_real, fold_synthetic) = scores, folds
    return Scores(of_real.double().numpy(), of_synthetic.double().numpy(), fold_real.numpy(), fold_synthetic.numpy())


def auc(scores: Scores, num_bootstrap: int, seed: int) -> tuple[float, list[float]]:
    """Share of pairs in which the synthetic patient has the larger score, and its interval over resampled patients.

    Pairs within a fold count, ties count half; 0.5 is what guessing gives, 1 a network that is never wrong.
    """
    larger = scores.synthetic[:, None] > scores.real
    right = np.where(scores.synthetic[:, None] == scores.real, 0.5, larger)
    paired = (scores.synthetic_folds[:, None] == scores.real_folds).astype(float)
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(num, np.full(num, 1 / num), size=num_bootstrap) for num in right.shape]
    num_right, num_pairs = (
        np.einsum("bq,qp,bp->b", drawn[0], values, drawn[1], optimize=True) for values in (right * paired, paired)
    )
    resampled = (num_right / np.maximum(num_pairs, 1))[num_pairs > 0]
    return float((right * paired).sum() / paired.sum()), [float(v) for v in np.percentile(resampled, CONFIDENCE)]


def _network() -> nn.Module:
    """Three convolutions with stride 2, the mean over the image, one score."""
    layers: list[nn.Module] = []
    for before, after in zip((2, *CHANNELS), CHANNELS, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    network: Any = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 1))
    return network.to(memory_format=torch.channels_last)


def _train(groups: list[Tensor], rng: torch.Generator, num_steps: int) -> nn.Module:
    """A network for real (0) against synthetic (1); each batch in one of the eight symmetries of a square.

    Without these it would learn the few training patients by heart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    half = BATCH // 2
    labels = torch.tensor([0.0] * half + [1.0] * half)
    for _ in range(num_steps):
        parts = []
        for group in groups:
            patient = torch.randint(len(group), (half,), generator=rng)
            parts.append(group[patient, torch.randint(group.shape[1], (half,), generator=rng)])
        images = torch.cat(parts)
        turns, mirrored = divmod(int(torch.randint(8, (1,), generator=rng)), 2)
        images = torch.rot90(images, turns, (2, 3))
        images = (images.flip(3) if mirrored else images).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network(images)[:, 0], labels).backward()
        optimizer.step()
    return network
