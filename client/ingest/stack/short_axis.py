"""Which images of a study form the short-axis cine: decided from positions, orientations and times alone.

No name or description is used: they are free text, and differ from site to site.

Known limit: where a study holds no other cine, tagged slices are taken for one, for only their images show the grid.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.places import Tally, common_folder
from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.stack.even_stack import even_run, is_complete
from fedcmr.client.ingest.stack.phases import MAX_NUM_CUT, equal_in_number, in_time
from fedcmr.client.ingest.stack.slices import SAME_POSITION_MM, Slice, cine_slices, parallel, series_of
from fedcmr.shared.orientation import BASE_TO_APEX

MIN_SLICES = 3
MAX_TILT_DEG = 45.0
"""A stack's normal lies within this angle of the usual long axis; axial, coronal and sagittal stacks are above 50."""
CLEARLY_NEARER_DEG = 15.0
"""A stack whose normal is nearer to the long axis by more than this wins; a stack planned twice differs by less."""
CLEARLY_FINER = 1.3
"""A stack whose pixels are smaller by more than this factor wins: real-time imaging is coarser than gated imaging."""
SAME_STACK_DEG = 20.0
"""Slices whose normals differ by less, and whose places continue each other, are parts of one stack."""
COVERED, NEXT = 0.6, 1.5
"""Spacings from the nearest slice of a stack, up to which a place lies in it, and up to which it is the next one."""
SAME_PLAN_DEG, SAME_SPACING = 8.0, 0.1
"""Slices that differ by more are a part of the stack only where they belong to its series, or are several at its
spacing and with its phases: a single cine of a valve, or a stack along its annulus, continues no ventricle."""
SAME_ECHO = 0.1
"""Echo times of one protocol differ by less of their size from slice to slice; another sequence's differ by more."""
MAX_SHIFT_MM = 2.0
"""Largest shift of a slice against the straight line through the stack."""
USUAL_BEAT = 1.25
"""A repeat replaces a slice only if the beat's length agrees to this factor: one under stress does not."""


@dataclass(frozen=True)
class Stack:
    """A short-axis cine: `images[z][t]`, slices along the normal, phases in temporal order.

    Attributes:
        images: Z lists of T headers each.
        affine: Shape (4, 4): (column, row, slice, 1) to LPS millimetres (PS3.3 C.7.6.2.1.1, Eq. C.7.6.2.1-1).
    """

    images: list[list[Header]]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Candidate:
    """Slices at even distances that could be the stack."""

    slices: list[Slice]
    is_one_series: bool

    @property
    def tilt_deg(self) -> float:
        """Angle between the normal and the usual long axis of the heart, 0..90 degrees."""
        return math.degrees(math.acos(min(1.0, abs(float(self.slices[0].first.normal @ BASE_TO_APEX)))))

    @property
    def latest(self) -> tuple[float, float]:
        """When the latest of its series was scanned, as `_when` has it."""
        return max(map(_when, self.slices))


def find_stack(images: Sequence[Header]) -> tuple[Stack, Tally]:
    """Pick the short-axis cine among the MR images of one study.

    A stack may be one series, one series per slice, or anything between. Images are grouped by orientation and matrix,
    then by series and place. Of slices that were scanned again, and of stacks that were, the last counts, as it does
    for who reads the study: it was repeated because the first had failed.

    Returns:
        The stack, and the other series by reason code, each where it lies.

    Raises:
        Unusable: There is no such stack, or more than one reading of it.
    """
    planes = [cine_slices(group) for group in parallel(images)]
    if any(one.is_whole for slices in planes for one in slices):
        # A copy of two phases, however late, does not compete with the cine that it was taken from.
        planes = [[one for one in slices if one.is_whole] for slices in planes]
    candidates: list[_Candidate] = []
    trouble = None
    for slices in planes:
        try:
            candidates += _candidates(slices)
        except Unusable as unusable:
            trouble = trouble or unusable
    if not candidates:
        raise trouble or Unusable("no-short-axis-cine")
    chosen = _best(candidates)
    _refuse_a_part(chosen, planes)
    stack = _sorted_stack([one.images for one in chosen.slices])
    return stack, _others(images, planes, chosen)


def _candidates(slices: Sequence[Slice]) -> list[_Candidate]:
    """The stacks that slices of one orientation and matrix make: of one series alone, and of one echo time.

    Raises:
        Unusable: There are enough slices, and yet no stack.
    """
    series: dict[frozenset[str], list[Slice]] = defaultdict(list)
    for one in slices:
        series[one.series].append(one)
    echoes: list[list[Slice]] = []
    for one in sorted(slices, key=lambda one: (math.isnan(one.first.EchoTime), one.first.EchoTime)):
        before = echoes[-1][0].first.EchoTime if echoes else math.inf
        if echoes and (math.isnan(one.first.EchoTime) or one.first.EchoTime <= (1 + SAME_ECHO) * before):
            echoes[-1].append(one)
        else:
            echoes.append([one])
    found, trouble = [], None
    for members, is_one_series in [*((m, True) for m in series.values()), *((m, False) for m in echoes)]:
        try:
            places = _one_per_place(members)
            tilted = _Candidate(places, is_one_series).tilt_deg > MAX_TILT_DEG
            if len(places) < MIN_SLICES or tilted:
                continue
            depths = [one.depth for one in places]
            kept = even_run(depths)
            if len(kept) < MIN_SLICES or not is_complete(depths, kept):
                raise Unusable("uneven-spacing")
            found.append(_Candidate([places[index] for index in kept], is_one_series))
        except Unusable as unusable:
            trouble = trouble or unusable
    if trouble and not found:
        raise trouble
    return found


def _one_per_place(slices: Sequence[Slice]) -> list[Slice]:
    """Slices by depth, of those at one place the last that is like the others.

    Raises:
        Unusable: Two of them are alike and nothing says which was last.
    """
    num_phases = Counter(len(one.images) for one in slices).most_common(1)[0][0]
    beats = [one.beat_ms for one in slices if not math.isnan(one.beat_ms)]
    usual_ms = float(np.median(beats)) if beats else math.nan

    def rank(one: Slice) -> tuple[bool, bool, tuple[float, float]]:
        usual_beat = not max(one.beat_ms / usual_ms, usual_ms / one.beat_ms) > USUAL_BEAT
        return abs(len(one.images) - num_phases) <= 1, usual_beat, _when(one)

    places: list[list[Slice]] = []
    for one in sorted(slices, key=lambda one: one.depth):
        if places and one.depth - places[-1][0].depth < SAME_POSITION_MM:
            places[-1].append(one)
        else:
            places.append([one])
    chosen = []
    for place in places:
        *others, best = sorted(place, key=rank)
        if others and rank(others[-1]) == rank(best):
            raise Unusable("ambiguous-stack")
        chosen.append(best)
    return chosen


def _best(candidates: Sequence[_Candidate]) -> _Candidate:
    """The stack along the heart's axis with the finest pixels, most slices, and of repeats the last.

    A whole series of which some slices were scanned again, as a series of their own, is a repeat too: the later slices
    stand in for the first ones at their places, so that the joined stack goes before the series.

    Raises:
        Unusable: Two are alike and nothing says which was last.
    """
    most = max(len(one.slices) for one in candidates)
    left = [one for one in candidates if 2 * len(one.slices) >= most]
    least_tilt = min(one.tilt_deg for one in left)
    left = [one for one in left if one.tilt_deg <= least_tilt + CLEARLY_NEARER_DEG]
    finest = min(max(one.slices[0].first.PixelSpacing) for one in left)
    left = [one for one in left if max(one.slices[0].first.PixelSpacing) <= CLEARLY_FINER * finest]

    def rank(one: _Candidate) -> tuple[int, tuple[float, float], bool]:
        return len(one.slices), one.latest, one.is_one_series

    *others, best = sorted(left, key=rank)
    if others and rank(others[-1]) == rank(best) and set(others[-1].slices) != set(best.slices):
        raise Unusable("ambiguous-stack")
    return best


def _refuse_a_part(chosen: _Candidate, planes: Sequence[Sequence[Slice]]) -> None:
    """Refuse a stack that continues with another matrix or orientation: its ventricle would be cut.

    Slices that cover the same places are no part of it, but a stack that was planned again.

    Raises:
        Unusable: It does.
    """
    normal = chosen.slices[0].first.normal
    kept = np.array([one.centre @ normal for one in chosen.slices])
    spacing = float(np.median(np.diff(kept)))
    for plane in planes:
        tilt = abs(float(plane[0].first.normal @ normal)) if plane else 0.0
        if tilt < math.cos(math.radians(SAME_STACK_DEG)) or chosen.slices[0] in plane:
            continue
        alike = [one for one in plane if _same_echo(one, chosen.slices[0])]
        if tilt < math.cos(math.radians(SAME_PLAN_DEG)) and not _same_plan(alike, chosen, spacing):
            continue
        apart = np.array([np.abs(kept - one.centre @ normal).min() for one in alike]) / spacing
        if (apart > COVERED).mean() > 0.5 and (apart[apart > COVERED] < NEXT).any():
            raise Unusable("mixed-geometry")


def _same_plan(plane: Sequence[Slice], chosen: _Candidate, spacing: float) -> bool:
    """Whether slices of another orientation were planned with the stack: in its series, or alike."""
    if series_of(plane) & series_of(chosen.slices):
        return True
    gaps = np.diff(sorted({round(one.depth, 1) for one in plane}))
    num_phases = len(chosen.slices[0].images)
    even = len(gaps) > 0 and bool((np.abs(gaps - spacing) <= SAME_SPACING * spacing).all())
    return even and all(abs(len(one.images) - num_phases) <= MAX_NUM_CUT for one in plane)


def _others(images: Sequence[Header], planes: Sequence[Sequence[Slice]], chosen: _Candidate) -> Tally:
    """The series that are no part of the stack, by reason code."""
    used = series_of(chosen.slices)
    repeated = series_of(one for slices in planes if set(slices) & set(chosen.slices) for one in slices) - used
    cine = series_of(one for slices in planes for one in slices) - used - repeated
    still = {image.SeriesInstanceUID for image in images} - used - repeated - cine
    paths: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        paths[image.SeriesInstanceUID].append(image.path)
    others = Tally()
    for code, series in (("repeated-slices", repeated), ("other-orientation", cine), ("not-cine", still)):
        for uid in sorted(series):
            others.add(code, common_folder(paths[uid]))
    return others


def _sorted_stack(positions: Sequence[Sequence[Header]]) -> Stack:
    """Phases sorted, and what holds for every stack checked."""
    images = equal_in_number([in_time(position) for position in positions])
    first = images[0][0]
    corners = np.array([position[0].ImagePositionPatient for position in images])
    step = (corners[-1] - corners[0]) / (len(corners) - 1)
    if np.linalg.norm(corners - corners[0] - np.arange(len(corners))[:, None] * step, axis=1).max() > MAX_SHIFT_MM:
        raise Unusable("slices-not-aligned")
    affine = np.eye(4)
    affine[:3, 0] = first.column_axis * first.PixelSpacing[1]
    affine[:3, 1] = first.row_axis * first.PixelSpacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = corners[0]
    return Stack(images, affine)


def _same_echo(one: Slice, other: Slice) -> bool:
    """Whether two slices are of one protocol, as far as their echo times tell."""
    ours, theirs = one.first.EchoTime, other.first.EchoTime
    return not abs(ours - theirs) > SAME_ECHO * max(ours, theirs)


def _when(one: Slice) -> tuple[float, float]:
    """SeriesNumber (0020,0011), which scanners count up, then the time of day; before all others what is missing."""
    images = one.images
    times = [image.AcquisitionTime for image in images if math.isfinite(image.AcquisitionTime)]
    numbers = [image.SeriesNumber for image in images if math.isfinite(image.SeriesNumber)]
    return max(numbers, default=-math.inf), max(times, default=-math.inf)
