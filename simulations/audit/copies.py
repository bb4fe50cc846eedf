"""Copies: is a synthetic image nearer to a training patient than to one whom nobody trained on?

Every image is sampled on rings around the ventricles' common centre. On rings a rotation is a shift and a mirrored
heart a reversal, so that one Fourier transform compares two hearts at all rotations and both hands, the eight
symmetries of the square among them. Small shifts are covered by sampling the real ones around nine centres.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from fedcmr.shared.case import Case, is_heart
from fedcmr.shared.progress import track_parts
from fedcmr.shared.views import IMAGE_SIZE, slice_pairs, with_heart

Float = NDArray[np.float64]

NUM_RINGS, NUM_ANGLES = 12, 64
MAX_RADIUS_PX = 24.0
"""48 mm around the centre: both ventricles and little of the chest."""
SHIFTS_PX = (-2.0, 0.0, 2.0)
"""Along rows and columns; between them the rings, 2 pixels wide, forgive the rest."""
COPY_FACTOR = 0.5
"""An image is called a copy below this part of the smallest distance between images of different people."""
NUM_HALVES = 200
CHUNK = 32


@dataclass(frozen=True)
class Pairs:
    """ED/ES pairs of slices that hold the heart.

    Attributes:
        images: Shape (M, 2, 64, 64), float32 in [-1, 1].
        masks: Shape (M, 2, 64, 64), uint8.
        owner: Shape (M,), the number of the patient in `names`.
        names: One per patient: its group, so that two scans of one patient are one.
    """

    images: Tensor
    masks: Tensor
    owner: NDArray[np.int64]
    names: list[str]


@dataclass(frozen=True)
class Nearest:
    """The nearest real image of every synthetic one, and the smallest distance to each real patient.

    Attributes:
        distance: Shape (M, P): to every patient's nearest image; 0 the same up to contrast, 1 unrelated, at most 2.
        index: Shape (M, P): which of the real images that is.
    """

    distance: Float
    index: NDArray[np.int64]


@dataclass(frozen=True)
class CopyAudit:
    """What the comparison found.

    Attributes:
        num_images: Synthetic images.
        num_training: Patients who trained.
        num_held_out: Patients who did not.
        share: Images nearer to the nearest training patient than to the nearest held-out one, out of equally many of
            both; 0.5 when nothing is copied.
        share_ci95: From halves of the patients (see `share_interval`).
        threshold: Distance below which an image is called a copy.
        smallest_between_people: The smallest distance between a held-out image and a training image.
        num_copies: Synthetic images below the threshold of a training image.
        num_near_held_out: The same of a held-out image, which no generator has seen: what chance gives.
        smallest_to_training: The smallest distance of any synthetic image to a training image.
    """

    num_images: int
    num_training: int
    num_held_out: int
    share: float
    share_ci95: tuple[float, float]
    threshold: float
    smallest_between_people: float
    num_copies: int
    num_near_held_out: int
    smallest_to_training: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the verdict."""
        low, high = self.share_ci95
        return {**asdict(self), "contains_chance": low <= 0.5 <= high, "copied": self.num_copies > 0 or low > 0.5}


def pairs_of(cases: Sequence[Case]) -> Pairs:
    """The slices of cases that hold the heart."""
    names = sorted({case.info.group or case.info.pseudonym for case in cases})
    images, masks, owner = [], [], []
    for case in cases:
        pairs, labels = slice_pairs(case)
        keep = with_heart(labels)
        images.append(pairs[keep])
        masks.append(labels[keep])
        owner += [names.index(case.info.group or case.info.pseudonym)] * int(keep.sum())
    size = (0, 2, IMAGE_SIZE, IMAGE_SIZE)
    return Pairs(
        torch.cat([torch.empty(size), *images]),
        torch.cat([torch.empty(size, dtype=torch.uint8), *masks]),
        np.array(owner, np.int64),
        names,
    )


def compare(synthetic: Pairs, real: Pairs) -> Nearest:
    """Distances of all synthetic images to all real patients, 1 - the largest correlation over all movements."""
    spectra = [_spectrum(rings(synthetic)), _spectrum(rings(synthetic, mirrored=True))]
    num = len(synthetic.images)
    distance = np.full((num, len(real.names)), 2.0)
    index = np.zeros(distance.shape, np.int64)
    shifts = [(dy, dx) for dy in SHIFTS_PX for dx in SHIFTS_PX]
    for part in track_parts(len(real.images), CHUNK, "comparing images"):
        some = Pairs(real.images[part], real.masks[part], real.owner[part], real.names)
        best = torch.full((num, len(some.images)), -1.0)
        for shift in shifts:
            other = _spectrum(rings(some, shift))
            for own in spectra:
                best = torch.maximum(best, _correlation(own, other))
        for column, owner in enumerate(some.owner):
            found = 1 - best[:, column].double().numpy()
            nearer = found < distance[:, owner]
            distance[nearer, owner] = found[nearer]
            index[nearer, owner] = part.start + column
    return Nearest(distance, index)


def audit(to_training: Float, to_held_out: Float, between: Float, seed: int = 0) -> CopyAudit:
    """The figures, from distances to patients.

    Args:
        to_training: Shape (M, T), every synthetic image's distance to every training patient; infinite for those of
            another vendor, who are not compared.
        to_held_out: Shape (M, H), the same for held-out patients.
        between: Shape (R, T), every held-out image's distance to every training patient.
        seed: Seed of the random halves.
    """
    smallest = float(between.min())
    threshold = COPY_FACTOR * smallest
    return CopyAudit(
        num_images=len(to_training),
        num_training=to_training.shape[1],
        num_held_out=to_held_out.shape[1],
        share=share_nearer(to_training, to_held_out),
        share_ci95=share_interval(to_training, to_held_out, seed),
        threshold=threshold,
        smallest_between_people=smallest,
        num_copies=int((to_training.min(axis=1) < threshold).sum()),
        num_near_held_out=int((to_held_out.min(axis=1) < threshold).sum()),
        smallest_to_training=float(to_training.min()),
    )


def share_nearer(to_training: Float, to_held_out: Float) -> float:
    """Mean probability that an image's nearest of k training patients is nearer than its nearest of k held-out ones.

    k is the smaller number of the two groups that are compared with the image; the larger group is thinned at random,
    which has a closed form: with n patients of whom b lie beyond the other group's nearest, all of k drawn ones do with
    probability C(b, k) / C(n, k).
    """
    near, far = (np.isfinite(values).sum(axis=1) for values in (to_training, to_held_out))
    beyond_near = (np.isfinite(to_training) & (to_training >= to_held_out.min(axis=1, keepdims=True))).sum(axis=1)
    beyond_far = (np.isfinite(to_held_out) & (to_held_out >= to_training.min(axis=1, keepdims=True))).sum(axis=1)
    shares = np.where(near >= far, 1 - _all_beyond(near, beyond_near, far), _all_beyond(far, beyond_far, near))
    compared = (near > 0) & (far > 0)
    return float(shares[compared].mean()) if compared.any() else float("nan")


def share_interval(to_training: Float, to_held_out: Float, seed: int) -> tuple[float, float]:
    """95 % interval of `share_nearer` over patients: the estimate +- 1.96 standard deviations among random halves.

    Images are not independent, for all are compared with the same patients; so patients are what is left out. The
    spread among estimates on halves is that of the whole estimate (Shao and Wu 1989,
    https://doi.org/10.1214/aos/1176347263, delete-d jackknife with d = n / 2). Drawing patients with replacement would
    shorten the list of nearest ones.
    """
    rng = np.random.default_rng(seed)
    whole = share_nearer(to_training, to_held_out)
    halves = []
    for _ in range(NUM_HALVES):
        chosen = [
            rng.permutation(values.shape[1])[: max(1, values.shape[1] // 2)] for values in (to_training, to_held_out)
        ]
        halves.append(share_nearer(to_training[:, chosen[0]], to_held_out[:, chosen[1]]))
    half = 1.96 * float(np.nanstd(halves))
    return max(whole - half, 0.0), min(whole + half, 1.0)


def rings(pairs: Pairs, shift: tuple[float, float] = (0.0, 0.0), mirrored: bool = False) -> Tensor:
    """Images on rings around the heart, zero mean and unit length; shape (M, 2 `NUM_RINGS`, `NUM_ANGLES`).

    Args:
        pairs: ED and ES are read around one centre, that of both ventricles at both phases.
        shift: Shift of the centre, along rows and columns, in pixels.
        mirrored: Angles run the other way round.
    """
    num = len(pairs.images)
    heart = is_heart(pairs.masks).float().mean(1)
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32)
    total = heart.sum((1, 2)).clamp(min=1e-6)
    row = (heart * axis[:, None]).sum((1, 2)) / total + shift[0]
    column = (heart * axis).sum((1, 2)) / total + shift[1]
    angle = torch.arange(NUM_ANGLES) * (2 * torch.pi / NUM_ANGLES) * (-1 if mirrored else 1)
    radius = (torch.arange(NUM_RINGS) + 0.5) * MAX_RADIUS_PX / NUM_RINGS
    y = row[:, None, None] + radius[:, None] * torch.sin(angle)
    x = column[:, None, None] + radius[:, None] * torch.cos(angle)
    grid = torch.stack([x, y], dim=-1) * 2 / (IMAGE_SIZE - 1) - 1
    # Averaged over a ring's width before sampling, so that a ring stands for its whole width.
    smooth = F.avg_pool2d(pairs.images, 3, stride=1, padding=1, count_include_pad=False)
    polar = F.grid_sample(smooth, grid, align_corners=True, padding_mode="border").reshape(num, -1, NUM_ANGLES)
    # A ring stands for an area that grows with its radius.
    weight = radius.sqrt().repeat(2)[:, None]
    mean = (polar * weight**2).sum((1, 2), keepdim=True) / (weight**2).sum() / NUM_ANGLES
    weighted = (polar - mean) * weight
    return weighted / weighted.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None]


def _spectrum(polar: Tensor) -> Tensor:
    return torch.fft.rfft(polar, dim=-1)


def _correlation(own: Tensor, other: Tensor) -> Tensor:
    """Largest circular correlation over angles, (M, R, A') and (N, R, A') -> (M, N)."""
    return torch.cat(
        [
            torch.fft.irfft(torch.einsum("mra,nra->mna", part, other.conj()), n=NUM_ANGLES, dim=-1).amax(-1)
            for part in own.split(256)
        ]
    )


def _all_beyond(num: NDArray[np.int64], num_beyond: NDArray[np.int64], num_drawn: NDArray[np.int64]) -> Float:
    """Probability that all of `num_drawn` out of `num`, drawn without replacement, are among `num_beyond` of them."""
    drawn = np.minimum(num_drawn, num_beyond)
    log = gammaln(num_beyond + 1) - gammaln(num_beyond - drawn + 1) - gammaln(num + 1) + gammaln(num - drawn + 1)
    return np.where(num_beyond >= num_drawn, np.exp(log), 0.0)
