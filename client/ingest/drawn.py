"""What of a stack somebody drew: the phases that are drawn whole, and the pixels about which nothing is known.

Contours are rarely complete. Many hospitals and public sets have the cavity in two phases and the muscle in one, and
some tried a third phase for a few slices. Readers give what they find and zeros elsewhere; what a zero says is decided
here.
"""

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.case import BACKGROUND, LV, NOT_DRAWN, STRUCTURES
from fedcmr.shared.ejection_fraction import MIN_COVERAGE


def phases_drawn(masks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Indices of the phases that may be end-diastole and end-systole: those with the most of the cavity drawn.

    Where more than two phases show a cavity, those are left out that show it in less than `MIN_COVERAGE` of the slices
    of the one that shows most; then, if two or more have more structures than the others, the others.

    Args:
        masks: Shape (T, Z, H, W), labels of `fedcmr.shared.case`.
    """
    num_slices = (masks == LV).any(axis=(2, 3)).sum(axis=1)
    phases = np.flatnonzero(num_slices)
    if len(phases) > 2 and len(whole := phases[num_slices[phases] >= MIN_COVERAGE * num_slices.max()]) >= 2:
        phases = whole
    if len(phases) > 2:
        num_structures = np.array([sum((masks[phase] == label).any() for label in STRUCTURES) for phase in phases])
        fullest = phases[num_structures == num_structures.max()]
        phases = fullest if len(fullest) >= 2 else phases
    return phases


def end_systole(masks: NDArray[np.uint8], phases: NDArray[np.int64]) -> int:
    """The phase with the smallest cavity that is not small because slices were left out.

    A phase has missed slices where another one shows the cavity in all of its slices and in more, and smaller in those
    that both show: a ventricle that has contracted further cannot have grown longer.

    Args:
        masks: Shape (T, Z, H, W).
        phases: Those that may be it, as `phases_drawn` gives them.
    """
    areas = np.count_nonzero(masks[phases] == LV, axis=(2, 3))
    for index in np.argsort(areas.sum(axis=1), kind="stable"):
        shown = areas[index] > 0
        longer = (areas[:, shown] > 0).all(axis=1) & ((areas > 0).sum(axis=1) > shown.sum())
        if not (longer & (areas[:, shown].sum(axis=1) < areas[index].sum())).any():
            return int(phases[index])
    raise AssertionError("a phase with the most slices of all has missed none")


def with_not_drawn(masks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """End-diastole and end-systole with `NOT_DRAWN` where nobody drew.

    A frame without one of the three structures is drawn in part: its labelled pixels keep their labels, and all others
    may belong to what was not drawn. That a pixel is certainly no cavity cannot be said. In a frame with all three,
    what is not labelled is background, except in slices that were passed over: those without a label between slices
    with a cavity, and all without a label where the other frame shows the cavity in more than twice as many.

    Args:
        masks: Shape (2, Z, H, W), 0 where nothing is labelled; `NOT_DRAWN` that is there stays.
    """
    marked = masks.copy()
    cavity = (masks == LV).any(axis=(2, 3))
    for phase, frame in enumerate(marked):
        unlabelled = frame == BACKGROUND
        if not all((frame == label).any() for label in STRUCTURES):
            frame[unlabelled] = NOT_DRAWN
            continue
        passed_over = unlabelled.all(axis=(1, 2))
        if cavity[phase].sum() >= MIN_COVERAGE * cavity[1 - phase].sum():
            first, last = np.flatnonzero(cavity[phase])[[0, -1]]
            passed_over[:first] = passed_over[last + 1 :] = False
        frame[passed_over] = NOT_DRAWN
    return marked
