"""The phases of a slice in temporal order, and of a stack in equal number: from times and numbers, never from names."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fedcmr.client.ingest.dicom.header import Header
from fedcmr.client.ingest.reasons import Unusable

MIN_PHASES = 6
ED_AND_ES = 2
"""Images of a cycle that was exported as end-diastole and end-systole alone, as synthetic data sets are. Two images at
a place may be anything else, so that CardiacNumberOfImages (0018,1090) must say it."""
MAX_BEAT_MS = 2500.0
"""A heartbeat of 24 a minute. A longer series of times runs over several beats: perfusion, real-time imaging."""
MIN_OVERLAP = 0.5
"""Share of the longest acquisition's time that all acquisitions of a slice must cover to be repeats of each other."""
MAX_STEP = 1.7
"""Between neighbouring phases, in median steps: a wider one is a hole."""
MAX_NUM_CUT = 2
"""Phases that slices may differ by. Prospective triggering samples every slice from the R wave at one rate until the
beat ends, and beats differ: the last phases of longer ones, late in diastole, have no partner in the others."""


def is_one_beat(images: Sequence[Header]) -> bool:
    """Whether a slice's images could be the phases of one heartbeat."""
    times = [image.TriggerTime for image in images if math.isfinite(image.TriggerTime)]
    enough = len(images) >= MIN_PHASES or all(len(images) == ED_AND_ES == one.CardiacNumberOfImages for one in images)
    return enough and (not times or max(times) - min(times) <= MAX_BEAT_MS)


def in_time(images: Sequence[Header]) -> list[Header]:
    """One slice's images in temporal order; of a slice that its series holds several times, the last acquisition.

    TriggerTime (0018,1060) decides. Where it is missing or one and the same for all (Philips may store the dynamic
    scan's or the inversion's time there), InstanceNumber does if it runs evenly: over phases within a slice, or over
    slices within a phase. The last resort are the numbers of Enhanced files of one phase each. Beats differ from slice
    to slice, so that only a phase's rank counts, not its time.

    Raises:
        Unusable: Neither distinguishes the phases.
    """
    images = _last_acquisition(images)
    times = [image.TriggerTime for image in images]
    numbers = [image.InstanceNumber for image in images]
    numbered = all(map(math.isfinite, numbers)) and len(set(numbers)) == len(numbers)
    if all(map(math.isfinite, times)):
        if len(set(times)) == len(times):
            return sorted(images, key=lambda image: image.TriggerTime)
        if numbered and len(set(times)) > 1:
            ordered = sorted(images, key=lambda image: image.InstanceNumber)
            if all(one.TriggerTime <= two.TriggerTime for one, two in pairwise(ordered)):
                return ordered
            raise Unusable("ambiguous-phase-order")
    if numbered and len(set(np.diff(sorted(numbers)))) == 1:
        return sorted(images, key=lambda image: image.InstanceNumber)
    orders = [image.order for image in images]
    if all(map(math.isfinite, orders)) and len(set(np.diff(sorted(orders)))) == 1 and len(set(orders)) == len(orders):
        return sorted(images, key=lambda image: image.order)
    raise Unusable("ambiguous-phase-order")


def equal_in_number(positions: Sequence[Sequence[Header]]) -> list[list[Header]]:
    """The first phases that all slices have, shape (Z, T) whatever the beats' lengths.

    Raises:
        Unusable: The slices differ by more than the end of a beat: a file is missing, or slices do not belong together.
    """
    num_phases = min(map(len, positions))
    if num_phases == max(map(len, positions)):
        return [list(position) for position in positions]
    if max(map(len, positions)) - num_phases > MAX_NUM_CUT or num_phases < MIN_PHASES:
        raise Unusable("uneven-phases")
    for key in ("TriggerTime", "InstanceNumber"):
        values = [np.array([getattr(image, key) for image in position]) for position in positions]
        steps = [np.diff(times) for times in values]
        if all(np.isfinite(times).all() and (step > 0).all() for times, step in zip(values, steps, strict=True)):
            usual = float(np.median(np.concatenate(steps)))
            # Slices have numbers of their own, but times that begin together: a late one has lost its first phase.
            starts = [times[0] for times in values] if key == "TriggerTime" else [0.0]
            if max(step.max() for step in steps) > MAX_STEP * usual or np.ptp(starts) > (MAX_STEP - 1) * usual:
                raise Unusable("uneven-phases")
            return [list(position[:num_phases]) for position in positions]
    raise Unusable("uneven-phases")


def _last_acquisition(images: Sequence[Header]) -> Sequence[Header]:
    """The images of the last of several beats or breath-holds in one series at one position; all where there is one.

    In the order of their numbers, each acquisition's times rise, and fall back where the next one begins.
    """
    ordered = sorted(images, key=lambda image: image.InstanceNumber)
    if not all(math.isfinite(value) for image in images for value in (image.TriggerTime, image.InstanceNumber)):
        return images
    blocks: list[list[Header]] = []
    for image in ordered:
        if not blocks or image.TriggerTime < blocks[-1][-1].TriggerTime:
            blocks.append([])
        blocks[-1].append(image)
    lengths = [len(block) for block in blocks]
    if len(blocks) == 1 or max(lengths) - min(lengths) > MAX_NUM_CUT or min(lengths) < MIN_PHASES:
        return images
    if max(lengths) > min(lengths) and not all(map(_is_even, blocks)):  # then no beats of other length
        return images
    first, last = (max(block[0].TriggerTime for block in blocks), min(block[-1].TriggerTime for block in blocks))
    longest = max(block[-1].TriggerTime - block[0].TriggerTime for block in blocks)
    return blocks[-1] if last - first > MIN_OVERLAP * longest else images


def _is_even(block: Sequence[Header]) -> bool:
    """Whether an acquisition's times are about equally far apart."""
    steps = np.diff([image.TriggerTime for image in block])
    return bool(0 < steps.max() <= MAX_STEP * steps.min())
