"""Where the heart is in a scan without masks: the public segmenter is run over the whole field of view.

What moves with the heartbeat shows roughly where to look (`fedcmr.client.ingest.centring`); on real scans its centre is
two to three centimetres off. The segmenter knows what a ventricle in its muscle looks like. It is fully convolutional:
on images of another size than those it was trained on it finds ventricles wherever they lie.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.client.ingest.centring import Centre, distance_mm
from fedcmr.shared.case import is_heart
from fedcmr.shared.tasks.segmentation.finds import finds_of_cavity
from fedcmr.shared.tasks.segmentation.segmenter import Segmenter, load_segmenter, segment
from fedcmr.shared.views import NETWORK_GRID, resampled

LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0
WINDOW_MM = 192.0
"""Side of the square around the first find in which the segmenter looks again: grey values are scaled to the heart and
its surroundings there, as in a case, and no longer to the fat of the chest wall."""
SMOOTHING_MM = 6.0
"""Standard deviation: finds of neighbouring slices lie on each other although the long axis is tilted."""
REACH_MM = 35.0
"""How far a slice's ventricle lies from the middle of all of them: the long axis is tilted, and breath-holds differ
by up to 3 cm in one of the public development patients."""
HEART_REACH_MM = 80.0
"""How far both ventricles reach from the middle of the left one, in the largest hearts."""
MIN_FOUND_MM2 = 80.0
"""Smaller finds are more often a vessel than an apex."""
MIN_MUSCLE = 0.5
"""Share of the band around a find that is muscle."""
MIN_SLICES = 2
"""With a ventricle in fewer slices nothing plausible was found."""
SIZE_STEP_PX = 16
"""The segmenter's images are a multiple of this high and wide."""
NUM_CLIMBS = 5


class _Find(NamedTuple):
    """A find of cavity in one image: which one, where, and how large and how much in muscle it is."""

    image: tuple[int, int]
    place: NDArray[np.bool_]
    middle: NDArray[np.float64]
    area: int
    muscle: float


class Heart(NamedTuple):
    """Where the heart was found, as (row, column) in the image.

    Attributes:
        centre: The middle of the labels of both ventricles and the muscle, which is what a case is centred on.
        ventricle: The middle of the left ventricle's cavity.
    """

    centre: Centre
    ventricle: Centre


def find_heart(
    images: NDArray[np.float32], spacing_mm: tuple[float, float, float], segmenter: Path | None = None
) -> Heart | None:
    """The heart around the ventricle that lies in muscle in most slices of both phases.

    Args:
        images: Shape (2, Z, H, W), about end-diastole and end-systole, any scale.
        spacing_mm: Slices, rows, columns.
        segmenter: Its file; None for the one that ships.

    Returns:
        None where no ventricle was found.
    """
    network = segmenter_of(segmenter)
    found = _find(network, images, spacing_mm)
    if found is None:
        return None
    window, corner = _window(images, spacing_mm, found.centre, WINDOW_MM)
    again = _find(network, window, spacing_mm)
    if again is None:
        return found
    return Heart(*((row + corner[0], column + corner[1]) for row, column in again))


def cavity_areas(
    images: NDArray[np.float32], spacing_mm: tuple[float, float, float], heart: Heart, segmenter: Path | None = None
) -> NDArray[np.float64]:
    """The left cavity's area in every phase, summed over the middle half of the slices.

    Each phase is shown to the segmenter as both of a pair, so that it is told nothing about which one is full.

    Args:
        images: Shape (T, Z, H, W), all phases.
        spacing_mm: Slices, rows, columns.
        heart: As `find_heart` gave it.
        segmenter: Its file; None for the one that ships.

    Returns:
        Shape (T,), in pixels of the segmenter's grid.
    """
    network = segmenter_of(segmenter)
    window, _ = _window(images, spacing_mm, heart.centre, NETWORK_GRID.size_px * NETWORK_GRID.pixel_mm)
    num_slices = window.shape[1]
    middle = window[:, num_slices // 4 : max(num_slices // 4 + 1, num_slices - num_slices // 4)]
    areas = []
    for phase in middle:
        chosen = ventricles_in(_segmented(network, np.stack([phase, phase]), spacing_mm), network.architecture.pixel_mm)
        areas.append(sum(find.area for find in chosen) / 2)
    return np.array(areas, np.float64)


def _window(
    images: NDArray[np.float32], spacing_mm: tuple[float, float, float], centre: Centre, side_mm: float
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """A square of the images around a centre, as far as they reach, and the row and column where it begins."""
    half = [side_mm / 2 / mm for mm in spacing_mm[1:]]
    first = [max(0, math.floor(middle - reach)) for middle, reach in zip(centre, half, strict=True)]
    last = [math.ceil(middle + reach) + 1 for middle, reach in zip(centre, half, strict=True)]
    return images[:, :, first[0] : last[0], first[1] : last[1]], (first[0], first[1])


@functools.lru_cache(maxsize=1)
def segmenter_of(path: Path | None) -> Segmenter:
    """The segmenter of a file, read once per process and used by one thread: there is one process per core."""
    torch.set_num_threads(1)
    return load_segmenter(path)


def _find(network: Segmenter, images: NDArray[np.float32], spacing_mm: tuple[float, float, float]) -> Heart | None:
    """One pass over all there is of the images."""
    pixel_mm = network.architecture.pixel_mm
    labels = _segmented(network, images, spacing_mm)
    chosen = ventricles_in(labels, pixel_mm)
    if len({slice_index for (_, slice_index), *_ in chosen}) < MIN_SLICES:
        return None
    ventricle = _middle(chosen)
    near = distance_mm(labels.shape[2:], ventricle, np.full(2, pixel_mm)) <= HEART_REACH_MM
    heart = np.zeros(labels.shape[2:])
    for find in chosen:
        parts, _ = ndimage.label(is_heart(labels[find.image]) & near)
        heart += np.isin(parts, np.setdiff1d(parts[find.place], [0]))
    from_middle = [
        (middle - (np.array(labels.shape[2:]) - 1) / 2) * pixel_mm
        for middle in (np.array(ndimage.center_of_mass(heart)), ventricle)
    ]
    size, mm = np.array(images.shape[2:]), np.array(spacing_mm[1:])
    centre, cavity = ((offset / mm + (size - 1) / 2).tolist() for offset in from_middle)
    return Heart((centre[0], centre[1]), (cavity[0], cavity[1]))


def _segmented(
    network: Segmenter, images: NDArray[np.float32], spacing_mm: tuple[float, float, float]
) -> NDArray[np.uint8]:
    """Labels of the images on a grid of the segmenter's pixel with the same middle, shape (2, Z, h, w)."""
    low, high = np.percentile(images, (LOW_PERCENTILE, HIGH_PERCENTILE))
    scaled = np.clip((images - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1).astype(np.float32)
    pixel_mm = network.architecture.pixel_mm
    size = [
        SIZE_STEP_PX * math.ceil(pixels * mm / pixel_mm / SIZE_STEP_PX)
        for pixels, mm in zip(images.shape[2:], spacing_mm[1:], strict=True)
    ]
    pairs = resampled(torch.from_numpy(scaled).transpose(0, 1), spacing_mm[1:], size, (pixel_mm, pixel_mm))
    labels: NDArray[np.uint8] = segment(network, pairs * 2 - 1).transpose(0, 1).numpy()
    return labels


def ventricles_in(
    labels: NDArray[np.uint8], pixel_mm: float, min_found_mm2: float = MIN_FOUND_MM2, min_muscle: float = MIN_MUSCLE
) -> list[_Find]:
    """At most one find per image: the largest in muscle near the place where most images have one.

    Args:
        labels: Shape (2, Z, H, W).
        pixel_mm: In-plane pixel.
        min_found_mm2: Smaller finds do not count.
        min_muscle: Finds with a smaller share of muscle around them do not count.
    """
    finds = []
    for image in np.ndindex(labels.shape[:2]):
        for place, muscle in finds_of_cavity(labels[image]):
            area = int(place.sum())
            if muscle >= min_muscle and area * pixel_mm**2 >= min_found_mm2:
                finds.append(_Find(image, place, np.array(ndimage.center_of_mass(place)), area, muscle))
    if not finds:
        return []
    score = np.zeros(labels.shape[2:])
    for find in finds:
        score[find.place] += find.muscle
    density = ndimage.gaussian_filter(score, SMOOTHING_MM / pixel_mm)
    middle = np.array(np.unravel_index(int(density.argmax()), density.shape), np.float64)
    chosen: list[_Find] = []
    for _ in range(NUM_CLIMBS):
        near = [find for find in finds if math.dist(find.middle, middle) * pixel_mm <= REACH_MM]
        best = {find.image: find for find in sorted(near, key=lambda find: find.muscle * find.area)}
        chosen = list(best.values())
        if not chosen:
            break
        middle = _middle(chosen)
    return chosen


def _middle(finds: list[_Find]) -> NDArray[np.float64]:
    """Centroid of all finds together."""
    return np.average([find.middle for find in finds], axis=0, weights=[find.area for find in finds])
