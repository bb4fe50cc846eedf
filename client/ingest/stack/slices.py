"""The images of a study as cine slices: by plane, place, series and contrast.

What a scan *is* shows in how its images differ: the phases of a cine share place, echo and inversion time and fit into
one heartbeat; those of a map, a perfusion or a real-time series do not.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.stack.phases import ED_AND_ES, MIN_PHASES, is_one_beat

SAME_DIRECTION = math.cos(math.radians(1.0))
SAME_CHORD = 2 * math.sin(math.radians(0.5))
"""Distance of the ends of unit vectors that far apart."""
SAME_GRID = 1e-3
SAME_POSITION_MM = 0.5
NOT_CINE = frozenset(
    {
        "P",
        "PHASE",
        "PHASE MAP",
        "PHASE SUBTRACT",
        "PHASE CONTRAST",
        "VELOCITY",
        "VELOCITY MAP",
        "R",
        "REAL",
        "I",
        "IMAGINARY",
        "T1 MAP",
        "T2 MAP",
        "T2 STAR MAP",
        "MPR",
        "PROJECTION IMAGE",
        "LOCALIZER",
        "PERFUSION",
        "TAGGING",
        "REALTIME",
    }
)
"""Values of ImageType (PS3.3 C.8.3.1.1.1, C.8.13.3.1.1, and what vendors put there) that rule a cine out."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The cine images at one position, in any order: of one series, or of one series for each of two phases."""

    images: list[Header]
    depth: float

    @property
    def first(self) -> Header:
        """Any one of its images."""
        return self.images[0]

    @property
    def series(self) -> frozenset[str]:
        """Its SeriesInstanceUIDs."""
        return frozenset(image.SeriesInstanceUID for image in self.images)

    @property
    def is_whole(self) -> bool:
        """Whether it is more than end-diastole and end-systole alone."""
        return len(self.images) >= MIN_PHASES

    @property
    def beat_ms(self) -> float:
        """The time its phases cover; NaN where the times are missing."""
        times = [image.TriggerTime for image in self.images]
        return (max(times) - min(times)) or math.nan

    @property
    def centre(self) -> NDArray[np.float64]:
        """Centre of the image, in LPS millimetres."""
        one = self.first
        down, right = ((n - 1) / 2 * mm for n, mm in zip((one.Rows, one.Columns), one.PixelSpacing, strict=True))
        return np.asarray(one.ImagePositionPatient) + down * one.row_axis + right * one.column_axis


def parallel(images: Sequence[Header]) -> list[list[Header]]:
    """Images grouped by orientation, matrix and pixel spacing."""
    same: dict[tuple[object, ...], list[Header]] = defaultdict(list)
    for image in images:  # most are equal to the digit: only one of them is compared by angles
        same[image.ImageOrientationPatient, image.PixelSpacing, image.Rows, image.Columns].append(image)
    equal = list(same.values())
    firsts = [images[0] for images in equal]
    axes = np.array([image.ImageOrientationPatient for image in firsts], np.float64).reshape(-1, 2, 3)
    axes /= np.linalg.norm(axes, axis=2, keepdims=True)
    grids = np.array([(*image.PixelSpacing, image.Rows, image.Columns) for image in firsts])
    # In the order of one component, so that each is compared with the few that are near in it, not with all.
    order = np.argsort(axes[:, 0, 0], kind="stable")
    ends = np.searchsorted(axes[order, 0, 0], axes[order, 0, 0] + SAME_CHORD, side="right")
    free = np.ones(len(equal), bool)
    groups = []
    for place, index in enumerate(order):
        if free[index]:
            near = order[place : ends[place]]
            near = near[free[near]]
            alike = (axes[near] * axes[index]).sum(axis=2).min(axis=1) > SAME_DIRECTION
            alike &= np.abs(grids[near] / grids[index] - 1).max(axis=1) < SAME_GRID
            free[near[alike]] = False
            groups.append([image for member in near[alike] for image in equal[member]])
    return groups


def cine_slices(group: Sequence[Header]) -> list[Slice]:
    """The cines among images of one orientation, by position along the normal, series and contrast."""
    normal = group[0].normal
    depths = {corner: float(normal @ np.asarray(corner)) for corner in {image.ImagePositionPatient for image in group}}
    positions: list[list[Header]] = []
    last = -math.inf
    for image in sorted(group, key=lambda image: depths[image.ImagePositionPatient]):
        depth = depths[image.ImagePositionPatient]
        if depth - last >= SAME_POSITION_MM:
            positions.append([])
        positions[-1].append(image)
        last = depth
    slices: list[Slice] = []
    for position in positions:
        series: dict[tuple[object, ...], list[Header]] = defaultdict(list)
        num_images = Counter(image.SeriesInstanceUID for image in position)
        for image in position:
            kinds = {kind.upper().replace("_", " ") for kind in image.ImageType}
            if not kinds & NOT_CINE and "IR" not in image.ScanningSequence:
                # A series a phase, so that every series is one volume, as synthetic data sets have it.
                alone = image.CardiacNumberOfImages == ED_AND_ES and num_images[image.SeriesInstanceUID] == 1
                one = "" if alone else image.SeriesInstanceUID
                # An echo or an inversion of its own each: the images of a map, not the phases of a cine.
                series[one, _rounded(image.EchoTime), _rounded(image.InversionTime)].append(image)
        depth = depths[position[0].ImagePositionPatient]
        slices += [Slice(phases, depth) for phases in series.values() if is_one_beat(phases)]
    return slices


def series_of(slices: Iterable[Slice]) -> set[str]:
    """The SeriesInstanceUIDs of several slices."""
    return {uid for one in slices for uid in one.series}


def _rounded(milliseconds: float) -> float | None:
    """To microseconds, and comparable where it is missing."""
    return None if math.isnan(milliseconds) else round(milliseconds, 3)
