"""Where the heart is and when it is full and empty: from masks where they exist, else from what moves."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.drawn import end_systole, phases_drawn
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import LV, MYO, is_heart

Centre = tuple[float, float]
"""Row and column in the image, from 0; fractions lie between pixels."""
HEART_RADIUS_MM = 50.0
REACH_MM = 60.0
"""How far both ventricles reach from their middle, in the largest hearts."""
SMOOTHING_MM = 12.0
"""Standard deviation: wide enough to join the walls that move, narrow enough to tell heart from chest."""
OUTLINE_MM = 5.0
"""Standard deviation: joins a ventricle's walls over its cavity, keeps the heart's outline."""
OUTLINE_SHARE = 0.3
"""As a share of the 90th percentile of motion near the heart: what moves less is not heart."""
PLANNED_WITHIN_MM = 70.0
CLIPPED_PERCENTILE = 99.0
"""Percentile at which the motion is cut off: a pulsating vessel or a flow artefact moves more than any wall."""
NUM_CLIMBS = 5
MIN_ORDERED_PHASES = 6
"""Fewer are labelled ones, picked from a cine."""
AVERAGED_MM = 6.0
MAX_DISORDER = 0.6
"""Square difference between neighbouring phases over that between any two: 0.12 to 0.22 in a real and 18 simulated
cines, up to 0.42 with noise of 15 % of blood added; 1 of noise alone or shuffled phases, below 0.6 by chance in one
shuffle of fifty."""
SMOOTHING = (0.25, 0.5, 0.25)
"""Over neighbouring phases, the cycle closed."""


def lv_voxels(masks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Voxels of the left ventricle's cavity in each phase, (T, Z, H, W) -> (T,)."""
    return np.count_nonzero(masks == LV, axis=(1, 2, 3)).astype(np.int64)


def find_frames(cine: Cine, centre: Centre | None = None, cavity: NDArray[np.float64] | None = None) -> tuple[int, int]:
    """End-diastole and end-systole: the phases with the largest and the smallest left ventricle of those drawn whole.

    Without masks the bright blood near the heart's centre stands for the ventricles, which fill and empty together.
    Where one phase alone is drawn, it is what the files call it, else the end to which its blood is nearer; the blood
    then finds the other.

    Args:
        cine: The stack.
        centre: As `find_centre` gave it, if it is known.
        cavity: The area of the left cavity in every phase, shape (T,), if a segmenter has measured it: without masks it
            then counts as much as the blood.

    Raises:
        Unusable: There are masks and no phase has a left ventricle, one alone has and another has its muscle, or the
            drawn ones do not differ.
    """
    drawn = None if cine.masks is None else phases_drawn(cine.masks)
    if cine.masks is not None and drawn is not None and len(drawn) != 1:
        if not len(drawn):
            raise Unusable("masks-implausible")
        volumes = lv_voxels(cine.masks)
        ed, es = int(drawn[volumes[drawn].argmax()]), end_systole(cine.masks, drawn)
        if volumes[ed] == volumes[es]:
            raise Unusable("masks-implausible")
        return ed, es
    if cine.masks is not None and (cine.masks[lv_voxels(cine.masks) == 0] == MYO).any():
        raise Unusable("masks-implausible")  # whoever drew the muscle's inner border has drawn the cavity
    if drawn is not None and cine.ends is not None and drawn[0] in cine.ends:
        return cine.ends
    blood = _blood_signal(cine, centre or find_centre(cine))
    if cavity is not None:
        blood = _standardised(blood) + _standardised(_smoothed(cavity))
    ed, es = int(blood.argmax()), int(blood.argmin())
    if drawn is not None:
        phase = int(drawn[0])
        if blood[ed] - blood[phase] <= blood[phase] - blood[es]:
            ed = phase
        else:
            es = phase
    if ed == es:
        raise Unusable("constant-image")
    return ed, es


def find_centre(cine: Cine) -> Centre:
    """The heart's centre in the plane as (row, column): the labels' centroid, or the centre of moving blood.

    Without masks the centre climbs to the densest part of what moves, starting from its peak; the scan is expected to
    have been planned with the heart near the middle of the image. Then it moves to the middle of the outline of what
    moves there: the right ventricle's free wall moves most, and would pull a mean weighted by motion towards itself.
    """
    if cine.masks is not None and (heart := is_heart(cine.masks)).any():
        return _centroid(np.count_nonzero(heart, axis=(0, 1)).astype(np.float64))
    pixel_mm = np.array(cine.spacing_mm[1:])
    motion = _moving_blood(cine).mean(axis=0)
    density = ndimage.gaussian_filter(motion, SMOOTHING_MM / pixel_mm)
    middle = (np.array(density.shape) - 1) / 2
    planned = np.exp(-0.5 * (distance_mm(density.shape, middle, pixel_mm) / PLANNED_WITHIN_MM) ** 2)
    centre = np.array(np.unravel_index(int((density * planned).argmax()), density.shape), np.float64)
    density = np.maximum(density - np.median(density), 0.0)
    for _ in range(NUM_CLIMBS):
        near = distance_mm(density.shape, centre, pixel_mm) <= HEART_RADIUS_MM
        centre = np.array(_centroid(np.where(near, density, 0.0)))
    density = ndimage.gaussian_filter(motion, OUTLINE_MM / pixel_mm)
    density -= np.median(density)
    for _ in range(NUM_CLIMBS):
        near = distance_mm(density.shape, centre, pixel_mm) <= REACH_MM
        heart = near & (density > OUTLINE_SHARE * max(np.percentile(density[near], 90.0), 0.0))
        centre = np.array(_centroid(heart.astype(np.float64)))
    return float(centre[0]), float(centre[1])


def in_order(cine: Cine, centre: Centre) -> bool:
    """Whether each phase looks like the next, near the heart and all slices together, more than like any other.

    Headers may call any order temporal: numbers are unreliable, and some vendors' times mean something else.
    """
    return len(cine.images) < MIN_ORDERED_PHASES or _disorder(cine, centre) <= MAX_DISORDER


def _disorder(cine: Cine, centre: Centre) -> float:
    """Mean square difference between neighbouring phases near the heart over that between any two of them."""
    reach = [HEART_RADIUS_MM / mm for mm in cine.spacing_mm[1:]]
    rows, columns = (slice(max(0, round(c - r)), round(c + r) + 1) for c, r in zip(centre, reach, strict=True))
    near = cine.images[:, :, rows, columns]
    for axis, pixel_mm in ((2, cine.spacing_mm[1]), (3, cine.spacing_mm[2])):  # averages suppress the noise
        near = np.add.reduceat(near, np.arange(0, near.shape[axis], max(1, round(AVERAGED_MM / pixel_mm))), axis=axis)
    phases = near.reshape(len(near), -1)
    phases = phases - phases.mean(axis=0)
    products = (phases @ phases.T).astype(np.float64)
    squares = np.diag(products)
    differences = squares[:, None] + squares - 2 * products
    neighbours = np.diag(differences, 1).mean()
    any_two = differences.sum() / (len(phases) * (len(phases) - 1))
    return float(neighbours / any_two) if any_two > 0 else 0.0


def _moving_blood(cine: Cine) -> NDArray[np.float64]:
    """How much each voxel changes with the heartbeat, times how bright it is; shape (Z, H, W).

    The first two temporal harmonics: noise, which spreads over all of them, counts little. Brightness keeps the edge
    between heart and lung, which moves as much, from pulling the centre sideways.
    """
    num_harmonics = min(2, cine.images.shape[0] // 2)
    spectrum = np.fft.rfft(cine.images, axis=0)[1 : 1 + num_harmonics]
    motion = np.sqrt((np.abs(spectrum) ** 2).sum(axis=0)) * (cine.images.mean(axis=0) - cine.images.min())
    return np.minimum(motion, np.percentile(motion, CLIPPED_PERCENTILE))


def _blood_signal(cine: Cine, centre: Centre) -> NDArray[np.float64]:
    """How much bright blood lies near the heart's centre in each phase, smoothed over the cycle; shape (T,).

    A voxel counts by how much it changes: one that blood leaves and muscle enters shows a ventricle's size.
    """
    distance = distance_mm(cine.images.shape[2:], np.array(centre), np.array(cine.spacing_mm[1:]))
    near = distance <= HEART_RADIUS_MM
    signal = (cine.images[:, :, near] * _moving_blood(cine)[:, near]).sum(axis=(1, 2))
    return _smoothed(signal)


def _smoothed(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the cycle; end-diastole and end-systole alone have no neighbours."""
    return signal if len(signal) < len(SMOOTHING) else ndimage.convolve1d(signal, SMOOTHING, mode="wrap")


def _standardised(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """With mean 0 and standard deviation 1; zeros where it is constant."""
    return (signal - signal.mean()) / (signal.std() or 1.0)


def distance_mm(
    shape: tuple[int, ...], centre: NDArray[np.float64], pixel_mm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of every pixel of a plane from a centre (row, column)."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.hypot((rows - centre[0]) * pixel_mm[0], (columns - centre[1]) * pixel_mm[1])


def _centroid(weights: NDArray[np.float64]) -> Centre:
    """Weighted mean position (row, column)."""
    total = weights.sum()
    if total <= 0:
        raise Unusable("constant-image")
    rows, columns = np.indices(weights.shape)
    return float((rows * weights).sum() / total), float((columns * weights).sum() / total)
