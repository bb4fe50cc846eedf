"""Which images of a study form the short-axis cine: decided from positions, orientations and times alone."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.ingest.header import Header
from client.ingest.normalise import BASE_TO_APEX
from client.ingest.reasons import Unusable

MIN_SLICES = 3
MIN_PHASES = 6
MAX_TILT_DEG = 45.0
"""A stack's normal lies within this angle of the usual long axis; axial, coronal and sagittal stacks are above 50."""
SAME_DIRECTION = math.cos(math.radians(1.0))
SAME_POSITION_MM = 0.5
MAX_SPACING_DEVIATION = 0.1
"""Of the median distance between slices."""
MAX_SHIFT_MM = 2.0
"""Of a slice against the straight line through the stack."""


@dataclass(frozen=True)
class Stack:
    """A short-axis cine: `images[z][t]`, slices along the normal, phases in temporal order.

    Attributes:
        images: Z lists of T headers each.
        affine: Shape (4, 4): (column, row, slice, 1) to LPS millimetres (PS3.3 C.7.6.2.1.1, Eq. C.7.6.2.1-1).
    """

    images: list[list[Header]]
    affine: NDArray[np.float64]


def find_stack(images: Sequence[Header]) -> tuple[Stack, Counter[str]]:
    """Pick the short-axis cine among the MR images of one study.

    A stack may be one series, or one series per slice. Images are grouped by orientation and matrix, then by position
    along the normal; the group whose normal is nearest to the usual long axis is the stack.

    Returns:
        The stack, and the number of other series by reason code.

    Raises:
        Unusable: There is no such stack, or more than one reading of it.
    """
    left_out: Counter[str] = Counter()
    stacks = []
    for group in _parallel(images):
        positions = [_choose_series(position) for position in _positions(group)]
        cine = [position for position in positions if position]
        used = {image.SeriesInstanceUID for position in cine for image in position}
        left_out["not-cine"] += len({image.SeriesInstanceUID for image in group} - used)
        tilt = _tilt_deg(group[0].normal)
        if len(cine) < MIN_SLICES or tilt > MAX_TILT_DEG:
            left_out["other-orientation"] += len(used)
        else:
            stacks.append((tilt, cine, len(used)))
    if not stacks:
        raise Unusable("no-short-axis-cine")
    stacks.sort(key=lambda stack: stack[0])
    left_out["other-orientation"] += sum(num_series for _, _, num_series in stacks[1:])
    return _sorted_stack(stacks[0][1]), +left_out


def _parallel(images: Sequence[Header]) -> list[list[Header]]:
    """Images grouped by orientation, matrix and pixel spacing."""
    groups: list[list[Header]] = []
    for image in images:
        for group in groups:
            first = group[0]
            same_grid = (first.Rows, first.Columns) == (image.Rows, image.Columns)
            same_grid = same_grid and np.allclose(first.PixelSpacing, image.PixelSpacing, rtol=1e-3)
            cosines = (first.row_axis @ image.row_axis, first.column_axis @ image.column_axis)
            if same_grid and min(cosines) > SAME_DIRECTION:
                group.append(image)
                break
        else:
            groups.append([image])
    return groups


def _positions(group: Sequence[Header]) -> list[list[Header]]:
    """Images of one orientation grouped by position along the normal, in that order."""
    normal = group[0].normal
    depth = {id(image): float(normal @ np.asarray(image.ImagePositionPatient)) for image in group}
    positions: list[list[Header]] = []
    for image in sorted(group, key=lambda image: depth[id(image)]):
        if positions and depth[id(image)] - depth[id(positions[-1][-1])] < SAME_POSITION_MM:
            positions[-1].append(image)
        else:
            positions.append([image])
    return positions


def _choose_series(position: Sequence[Header]) -> list[Header]:
    """The cine series at one position; empty where there is none."""
    series: dict[str, list[Header]] = defaultdict(list)
    for image in position:
        series[image.SeriesInstanceUID].append(image)
    cines = [images for images in series.values() if len(images) >= MIN_PHASES]
    if len(cines) > 1:
        raise Unusable("ambiguous-stack")
    return cines[0] if cines else []


def _tilt_deg(normal: NDArray[np.float64]) -> float:
    """Angle between a stack's normal and the usual long axis of the heart, 0..90 degrees."""
    return math.degrees(math.acos(min(1.0, abs(float(normal @ BASE_TO_APEX)))))


def _sorted_stack(positions: list[list[Header]]) -> Stack:
    """Phases sorted, and what holds for every stack checked."""
    if len({len(position) for position in positions}) > 1:
        raise Unusable("uneven-phases")
    images = [_in_time(position) for position in positions]
    first = images[0][0]
    corners = np.array([position[0].ImagePositionPatient for position in images])
    depths = corners @ first.normal
    gaps = np.diff(depths)
    spacing = float(np.median(gaps))
    if np.abs(gaps - spacing).max() > MAX_SPACING_DEVIATION * spacing:
        raise Unusable("uneven-spacing")
    step = (corners[-1] - corners[0]) / (len(corners) - 1)
    if np.linalg.norm(corners - corners[0] - np.arange(len(corners))[:, None] * step, axis=1).max() > MAX_SHIFT_MM:
        raise Unusable("slices-not-aligned")
    affine = np.eye(4)
    affine[:3, 0] = first.column_axis * first.PixelSpacing[1]
    affine[:3, 1] = first.row_axis * first.PixelSpacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = corners[0]
    return Stack(images, affine)


def _in_time(position: Sequence[Header]) -> list[Header]:
    """One slice's images by TriggerTime; by InstanceNumber where the times are missing or repeat.

    Philips may store one and the same value, the dynamic scan's or the inversion's time, in every TriggerTime.
    """
    for key in ("TriggerTime", "InstanceNumber"):
        values = [getattr(image, key) for image in position]
        if all(map(math.isfinite, values)) and len(set(values)) == len(values):
            return sorted(position, key=lambda image: getattr(image, key))
    raise Unusable("ambiguous-phase-order")
