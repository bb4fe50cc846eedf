"""Where the heart is and when it is full and empty: from masks where they exist, else from what moves."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from client.ingest.cine import Cine
from client.ingest.reasons import Unusable
from shared.case import LV

HEART_RADIUS_MM = 50.0
SMOOTHING_MM = 12.0
"""Standard deviation: wide enough to join the walls that move, narrow enough to tell heart from chest."""
PLANNED_WITHIN_MM = 70.0
CLIPPED_PERCENTILE = 99.0
"""Of the motion: a pulsating vessel or a flow artefact moves more than any wall."""
NUM_CLIMBS = 5


def lv_voxels(masks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Voxels of the left ventricle's cavity in each phase, (T, Z, H, W) -> (T,)."""
    return np.count_nonzero(masks == LV, axis=(1, 2, 3)).astype(np.int64)


def find_frames(cine: Cine) -> tuple[int, int]:
    """End-diastole and end-systole: the phases with the largest and the smallest left ventricle.

    Without masks the bright blood near the heart's centre stands for the ventricles, which fill and empty together.

    Raises:
        Unusable: Fewer than two phases are labelled, or the labelled ones do not differ.
    """
    if cine.masks is not None:
        volumes = lv_voxels(cine.masks)
        labelled = np.flatnonzero(volumes)
        if labelled.size == 0:
            raise Unusable("masks-implausible")
        ed, es = int(volumes.argmax()), int(labelled[volumes[labelled].argmin()])
    else:
        blood = _blood_signal(cine)
        ed, es = int(blood.argmax()), int(blood.argmin())
    if ed == es:
        raise Unusable("masks-implausible" if cine.masks is not None else "constant-image")
    return ed, es


def find_centre(cine: Cine) -> tuple[float, float]:
    """The heart's centre in the plane as (row, column): the labels' centroid, or the centre of moving blood.

    Without masks the centre climbs to the densest part of what moves, starting from its peak; the scan is expected to
    have been planned with the heart near the middle of the picture.
    """
    if cine.masks is not None and cine.masks.any():
        return _centroid(np.count_nonzero(cine.masks, axis=(0, 1)).astype(np.float64))
    pixel_mm = np.array(cine.spacing_mm[1:])
    density = ndimage.gaussian_filter(_moving_blood(cine).mean(axis=0), SMOOTHING_MM / pixel_mm)
    middle = (np.array(density.shape) - 1) / 2
    planned = np.exp(-0.5 * (_distance_mm(density.shape, middle, pixel_mm) / PLANNED_WITHIN_MM) ** 2)
    centre = np.array(np.unravel_index(int((density * planned).argmax()), density.shape), np.float64)
    density = np.maximum(density - np.median(density), 0.0)
    for _ in range(NUM_CLIMBS):
        near = _distance_mm(density.shape, centre, pixel_mm) <= HEART_RADIUS_MM
        centre = np.array(_centroid(np.where(near, density, 0.0)))
    return float(centre[0]), float(centre[1])


def _moving_blood(cine: Cine) -> NDArray[np.float64]:
    """How much each voxel changes with the heartbeat, times how bright it is; shape (Z, H, W).

    The first two temporal harmonics: noise, which spreads over all of them, counts little. Brightness keeps the edge
    between heart and lung, which moves as much, from pulling the centre sideways.
    """
    num_harmonics = min(2, cine.images.shape[0] // 2)
    spectrum = np.fft.rfft(cine.images, axis=0)[1 : 1 + num_harmonics]
    motion = np.sqrt((np.abs(spectrum) ** 2).sum(axis=0)) * (cine.images.mean(axis=0) - cine.images.min())
    return np.minimum(motion, np.percentile(motion, CLIPPED_PERCENTILE))


def _blood_signal(cine: Cine) -> NDArray[np.float64]:
    """How much bright blood lies near the heart's centre in each phase, smoothed over the cycle; shape (T,).

    A voxel counts by how much it changes: one that blood leaves and muscle enters tells a ventricle's size.
    """
    distance = _distance_mm(cine.images.shape[2:], np.array(find_centre(cine)), np.array(cine.spacing_mm[1:]))
    near = distance <= HEART_RADIUS_MM
    signal = (cine.images[:, :, near] * _moving_blood(cine)[:, near]).sum(axis=(1, 2))
    return ndimage.convolve1d(signal, [0.25, 0.5, 0.25], mode="wrap")


def _distance_mm(
    shape: tuple[int, ...], centre: NDArray[np.float64], pixel_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of every pixel of a plane from a centre (row, column)."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.hypot((rows - centre[0]) * pixel_mm[0], (columns - centre[1]) * pixel_mm[1])


def _centroid(weights: NDArray[np.float64]) -> tuple[float, float]:
    """Weighted mean position (row, column)."""
    total = weights.sum()
    if total <= 0:
        raise Unusable("constant-image")
    rows, columns = np.indices(weights.shape)
    return float((rows * weights).sum() / total), float((columns * weights).sum() / total)
