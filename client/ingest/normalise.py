"""One form for every scanner: orientation, in-plane resampling, heart-centred crop, intensity scale."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from fedcmr.client.ingest.centring import MIN_ORDERED_PHASES, Centre, find_centre, find_frames, in_order
from fedcmr.client.ingest.cine import Cine
from fedcmr.client.ingest.drawn import with_not_drawn
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.shared.case import CASE_PIXEL_MM, CASE_SIZE, LV, NOT_DRAWN, RV, is_heart
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.orientation import BASE_TO_APEX

LV_TO_RV = np.array([-0.75, -0.6, -0.3]) / np.linalg.norm([-0.75, -0.6, -0.3])
"""Where the right ventricle usually lies: to the right and in front of the left one."""
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0
MAX_EF_DIFFERENCE = 0.01
"""Resampled masks may miss the original ejection fraction by one point."""
MAX_CUT_OFF = 0.02
"""Share of the cavity that the crop may lose in a phase, where there is no ejection fraction to compare."""


@dataclass(frozen=True)
class Normalised:
    """The arrays of a `fedcmr.shared.case.Case`, and its ejection fraction.

    Attributes:
        frames: Shape (2, Z, 96, 96), float32 in [0, 1].
        masks: Shape (2, Z, 96, 96), uint8, 255 where nobody drew; all zero where the scans have none.
        spacing_mm: Shape (3,), float32.
        ef: From the masks as they were drawn, before resampling; where they give none what the reader knew, or NaN.
        ed: The phase of the first frame, from 0; `es` that of the second.
        warnings: Codes of `REASONS` about how the heart was found.
    """

    frames: NDArray[np.float32]
    masks: NDArray[np.uint8]
    spacing_mm: NDArray[np.float32]
    ef: float
    ed: int
    es: int
    warnings: tuple[str, ...] = ()


def normalise(cine: Cine, segmenter: Path | None = None) -> Normalised:
    """Bring a stack into the form all sites share.

    Args:
        cine: As it was scanned.
        segmenter: File of the segmenter that finds the heart where there are no masks; None for the one that ships.

    Raises:
        Unusable: The images hold no contrast or follow each other in no order, or the masks cannot be a heart.
    """
    cine = orient(cine)
    centre, (ed, es), warnings = _located(cine, segmenter)
    frames = cine.images[[ed, es]]
    if any(np.ptp(frame) == 0 for frame in frames):
        raise Unusable("constant-image")
    frames = _scale(_crop(frames - frames.min(), centre, cine.spacing_mm))
    masks, ef = np.zeros(frames.shape, np.uint8), cine.ef
    if cine.masks is not None:
        original = with_not_drawn(cine.masks[[ed, es]])
        one_hot = np.stack([(original == label).astype(np.float32) for label in range(LV + 1)])
        masks = _labels(_crop(one_hot, centre, cine.spacing_mm), (original == NOT_DRAWN).any(axis=(1, 2, 3)))
        drawn_ef = ejection_fraction(original)
        if _is_cut_off(original, masks, cine.spacing_mm, drawn_ef):
            raise Unusable("heart-beyond-crop")
        ef = cine.ef if math.isnan(drawn_ef) else drawn_ef
    spacing_mm = np.array([cine.spacing_mm[0], CASE_PIXEL_MM, CASE_PIXEL_MM], np.float32)
    return Normalised(frames, masks, spacing_mm, ef, ed, es, warnings)


def _located(cine: Cine, segmenter: Path | None) -> tuple[Centre, tuple[int, int], tuple[str, ...]]:
    """The heart's centre, end-diastole and end-systole, and codes of `REASONS`.

    Without masks what moves gives a first pair of phases, the segmenter the heart in them, and both the phases.
    """
    centre = find_centre(cine)
    if not in_order(cine, centre):
        raise Unusable("phases-out-of-order")
    frames = find_frames(cine, centre)
    if cine.masks is not None:
        return centre, frames, ()
    # torch takes seconds to load, which scans with masks need not wait for.
    from fedcmr.client.ingest.heart_finder import cavity_areas, find_heart

    heart = find_heart(cine.images[list(frames)], cine.spacing_mm, segmenter)
    if heart is None:
        return centre, frames, ("heart-by-motion",)
    if len(cine.images) < MIN_ORDERED_PHASES:  # two are there, and which one is full the blood says well
        return heart.centre, find_frames(cine, heart.centre), ()
    cavity = cavity_areas(cine.images, cine.spacing_mm, heart, segmenter)
    return heart.centre, find_frames(cine, heart.centre, cavity), ()


def orient(cine: Cine) -> Cine:
    """Slices from base to apex, seen from the apex, the right ventricle at the upper left: flips and transposes only.

    A radiologist's short-axis view has the patient's right at the left of the image. Scanners differ by up to half a
    quarter turn within it, which is left as it is.
    """
    if not _starts_at_base(cine):
        cine = _rearranged(cine, flipped=0)
    if cine.axes is not None and np.cross(cine.axes[2], cine.axes[1]) @ cine.axes[0] > 0:
        # Columns x rows points away from the viewer. Where that is towards the apex, the view is from the base.
        cine = _rearranged(cine, order=(0, 2, 1))
    down, right = _lv_to_rv(cine)
    while (down, right) != (0.0, 0.0) and not (down <= 0 and right < 0):
        cine = _rearranged(cine, order=(0, 2, 1), flipped=1)  # a quarter turn anticlockwise
        down, right = -right, down
    return cine


def _rearranged(cine: Cine, order: tuple[int, int, int] = (0, 1, 2), flipped: int | None = None) -> Cine:
    """Slices, rows and columns in another order, then one of them reversed; views, nothing is copied."""

    def move(array: NDArray[Any]) -> NDArray[Any]:
        moved = array.transpose(0, *(1 + axis for axis in order))
        return moved if flipped is None else np.flip(moved, 1 + flipped)

    axes = cine.axes
    if axes is not None:
        axes = axes[list(order)]
        if flipped is not None:
            axes[flipped] *= -1
    z, y, x = (cine.spacing_mm[axis] for axis in order)
    masks = None if cine.masks is None else move(cine.masks)
    return replace(cine, images=move(cine.images), masks=masks, axes=axes, spacing_mm=(z, y, x))


def _starts_at_base(cine: Cine) -> bool:
    """Whether the first slice is the basal one: the labelled area shrinks towards the apex, or the axes say so."""
    if cine.masks is not None:
        area = np.count_nonzero(is_heart(cine.masks), axis=(0, 2, 3))
        position = np.arange(len(area)) - (len(area) - 1) / 2
        labelled = area > 0
        if np.count_nonzero(labelled) > 1:
            return bool(np.polyfit(position[labelled], area[labelled], 1)[0] <= 0)
    return cine.axes is None or bool(cine.axes[0] @ BASE_TO_APEX >= 0)


def _lv_to_rv(cine: Cine) -> tuple[float, float]:
    """Direction (down, right) in the image from the left to the right ventricle; zeros where it is unknown."""
    if cine.masks is not None:
        planes = [np.count_nonzero(cine.masks == label, axis=(0, 1)) for label in (LV, RV)]
        if all(plane.any() for plane in planes):
            lv, rv = (np.array([np.average(i, weights=plane) for i in np.indices(plane.shape)]) for plane in planes)
            return float(rv[0] - lv[0]), float(rv[1] - lv[1])
    if cine.axes is None:
        return 0.0, 0.0
    return float(cine.axes[1] @ LV_TO_RV), float(cine.axes[2] @ LV_TO_RV)


def _crop(
    array: NDArray[np.float32], centre: tuple[float, float], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float32]:
    """A case's square around `centre`, shape (..., H, W) -> (..., 96, 96)."""
    for pixel_mm, middle in zip(spacing_mm[1:], centre, strict=True):
        # Rows first; the resampled axis moves to the end, so that columns are next. Sparse, not dense: threads of a
        # dense product that wait for a core cost more than the product.
        weights = _resampling(array.shape[-2], pixel_mm, middle)
        flat = np.ascontiguousarray(np.moveaxis(array, -2, 0))
        flat, shape = flat.reshape(len(flat), -1), flat.shape[1:]
        array = np.moveaxis((weights @ flat).reshape(-1, *shape), 0, -1)
    return array


def _resampling(size: int, pixel_mm: float, centre: float) -> csr_array:
    """Linear resampling of one axis to a case's grid around `centre`, as a matrix of shape (`CASE_SIZE`, size).

    The triangle kernel is as wide as the coarser of both grids, so that fine pixels are averaged, not skipped.
    """
    step = CASE_PIXEL_MM / pixel_mm
    width = max(step, 1.0)
    targets = centre + (np.arange(CASE_SIZE) - (CASE_SIZE - 1) / 2) * step
    margin = CASE_SIZE * math.ceil(width)
    pixels = np.arange(-margin, size + margin)
    weights = np.clip(1 - np.abs(targets[:, None] - pixels) / width, 0, None)
    # A row's weights add up to one before what lies outside is cut off: there the image counts as zero.
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return csr_array(weights[:, margin : margin + size].astype(np.float32))


def _is_cut_off(
    original: NDArray[np.uint8], masks: NDArray[np.uint8], spacing_mm: tuple[float, float, float], ef: float
) -> bool:
    """Whether the resampled masks have lost a part of the left ventricle; by the ejection fraction, if there is one."""
    if not math.isnan(ef):
        return not abs(ejection_fraction(masks) - ef) <= MAX_EF_DIFFERENCE
    before_mm2 = np.count_nonzero(original == LV, axis=(1, 2, 3)) * (spacing_mm[1] * spacing_mm[2])
    after_mm2 = np.count_nonzero(masks == LV, axis=(1, 2, 3)) * CASE_PIXEL_MM**2
    return bool((after_mm2 < (1 - MAX_CUT_OFF) * before_mm2).any())


def _labels(shares: NDArray[np.float32], in_part: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The label with the largest share of each pixel, keeping every slice's cavity area.

    Thresholding a small round cavity on a new grid gains or loses a few percent of it by chance; so the cavity takes as
    many pixels as its shares add up to, those with the largest shares first.

    Args:
        shares: Shape (4, T, Z, H, W), of background and the three structures.
        in_part: Shape (T,), in which frames something is not drawn. There what the labels leave of a pixel is unknown,
            and so is what lies outside the image; in others that is background.
    """
    masks = shares[:LV].argmax(axis=0).astype(np.uint8)
    unknown = 1 - shares.sum(axis=0)
    masks[in_part[:, None, None, None] & (unknown > shares[:LV].max(axis=0))] = NOT_DRAWN
    for plane in np.ndindex(shares.shape[1:-2]):
        share = shares[(LV, *plane)].ravel()
        largest = np.argsort(-share, kind="stable")[: round(float(share.sum()))]
        masks[plane].flat[largest] = LV
    return masks


def _scale(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Percentiles of both frames together to 0 and 1, clipped."""
    low, high = np.percentile(frames, (LOW_PERCENTILE, HIGH_PERCENTILE))
    if not high > low:
        raise Unusable("constant-image")
    return np.clip((frames - low) / (high - low), 0, 1).astype(np.float32)
