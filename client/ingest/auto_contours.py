"""Contours that nobody drew: the segmenter's labels of a case, cleaned, and whether they can be kept.

They serve what a site computes for itself, style statistics and the generator's gradients. They are never truth: a case
with such contours has no ejection fraction of its own, and tests no segmenter.

**Drawn in part.** What a person drew stays, pixel for pixel. A structure that somebody drew in a frame is not looked
for in that frame, but for the slices that were passed over; the others are filled in where nobody drew.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedcmr.client.ingest.heart_finder import segmenter_of, ventricles_in
from fedcmr.client.ingest.plausibility import myocardium_at_border
from fedcmr.shared.case import ED, ES, LV, MYO, NOT_DRAWN, RV, STRUCTURES, Case, is_heart
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.tasks.segmentation.inference import predict_probabilities

MIN_FOUND_MM2, MIN_MUSCLE = 20.0, 0.3
"""Less than the heart finder asks: where the heart is is known, and the apex at end-systole is small."""
ADJACENT_PX = 3
"""Muscle and right ventricle begin within this many pixels of the cavity, or of the muscle."""
NEAR_PX = 7
"""About a centimetre: probability beyond it belongs to other organs."""
MIN_LENGTH_MM = {ED: 35.0, ES: 25.0}
"""Of the stack of slices with a cavity: a left ventricle is 7 to 10 cm long, and stacks miss some of base and apex."""
VOLUME_ML = (30.0, 600.0)
"""Of the left cavity at end-diastole."""
EF_RANGE = (0.05, 0.85)
MIN_MYOCARDIUM_AT_BORDER = 0.8
MIN_DICE = {LV: 0.80, MYO: 0.70, RV: 0.55}
"""With a lower expected Dice in either phase contours are left out."""
SURE_DICE = {LV: 0.88, MYO: 0.80, RV: 0.80}
"""With a lower one a person should look at them."""
SURE_COVERAGE = 0.67
"""Likewise where end-systole shows the cavity in a smaller share of end-diastole's slices: see `MIN_COVERAGE`."""
NOT_FOUND, IMPLAUSIBLE, UNCERTAIN, TO_CHECK = "auto-not-found", "auto-implausible", "auto-uncertain", "auto-to-check"


@dataclass(frozen=True)
class Contours:
    """What the segmenter found in a case.

    Attributes:
        masks: Shape (2, Z, H, W), uint8; where they are left out, those that the case came with.
        dice: The expected Dice of every structure, the smaller one of both phases; empty where nothing was found.
        code: A code of `REASONS`: why they were left out, or `TO_CHECK` where a person should look; else empty.
    """

    masks: NDArray[np.uint8]
    dice: dict[int, float]
    code: str

    @property
    def kept(self) -> bool:
        """Whether the masks hold what the segmenter found."""
        return self.code in ("", TO_CHECK)


def find_contours(case: Case, segmenter: Path | None = None) -> Contours:
    """Label both phases of a case without contours, or fill in what was not drawn.

    Args:
        case: Its masks are empty, or hold `NOT_DRAWN`.
        segmenter: Its file; None for the one that ships.
    """
    likely = predict_probabilities(segmenter_of(segmenter), [case])[0].transpose(0, 1).numpy()
    masks = _cleaned(likely.argmax(axis=2).astype(np.uint8), float(case.spacing_mm[1]))
    if is_heart(case.masks).any():
        masks = _filled(case.masks, masks, likely)
    if not all((masks[phase] == label).any() for phase in (ED, ES) for label in STRUCTURES):
        return Contours(case.masks, {}, NOT_FOUND)
    dice = expected_dice(masks, likely)
    if not _is_plausible(masks, case.spacing_mm):
        return Contours(case.masks, dice, IMPLAUSIBLE)
    if any(dice[label] < MIN_DICE[label] for label in STRUCTURES):
        return Contours(case.masks, dice, UNCERTAIN)
    num_slices = (masks == LV).any(axis=(2, 3)).sum(axis=1)
    unsure = any(dice[label] < SURE_DICE[label] for label in STRUCTURES)
    unsure |= bool(num_slices[ES] < SURE_COVERAGE * num_slices[ED])
    return Contours(masks, dice, TO_CHECK if unsure else "")


def expected_dice(masks: NDArray[np.uint8], likely: NDArray[np.float32]) -> dict[int, float]:
    """2 sum(p m) / (sum p + sum m) of every structure near the heart, the smaller of both phases.

    What the Dice coefficient with the truth would be, to first order, if the network's probabilities were right.

    Args:
        masks: Shape (2, Z, H, W).
        likely: Probabilities, shape (2, Z, 4, H, W).
    """
    near = ndimage.binary_dilation(is_heart(masks).any(axis=(0, 1)), iterations=NEAR_PX)
    values = {}
    for label in STRUCTURES:
        of_label = [(masks[phase][:, near] == label, likely[phase][:, label][:, near]) for phase in (ED, ES)]
        values[label] = min(float(2 * p[m].sum() / max(p.sum() + m.sum(), 1e-9)) for m, p in of_label)
    return values


def _cleaned(labels: NDArray[np.uint8], pixel_mm: float) -> NDArray[np.uint8]:
    """One ventricle per slice, with the muscle and the right ventricle next to it, in slices without a gap."""
    cleaned = np.zeros_like(labels)
    for find in ventricles_in(labels, pixel_mm, MIN_FOUND_MM2, MIN_MUSCLE):
        image = labels[find.image]
        cavity = ndimage.binary_fill_holes(find.place)
        muscle = _touching(image == MYO, cavity)
        ventricle = _touching(image == RV, cavity | muscle)
        parts, num = ndimage.label(ventricle)
        if num > 1:
            ventricle = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
        cleaned[find.image][ventricle] = RV
        cleaned[find.image][muscle] = MYO
        cleaned[find.image][cavity] = LV
    kept = np.zeros(labels.shape[:2], dtype=bool)
    kept[ED] = _longest_run((cleaned[ED] == LV).any(axis=(1, 2)))
    kept[ES] = _longest_run((cleaned[ES] == LV).any(axis=(1, 2)) & kept[ED])  # no ventricle grows longer
    cleaned[~kept] = 0
    return cleaned


def _touching(area: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts of an area that begin near another one."""
    parts, _ = ndimage.label(area)
    near = ndimage.binary_dilation(other, iterations=ADJACENT_PX)
    return np.isin(parts, np.setdiff1d(parts[near], [0]))


def _longest_run(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The longest row of slices without a gap."""
    runs, num = ndimage.label(found)
    return runs == 1 + int(np.argmax(np.bincount(runs)[1:])) if num else found


def _filled(drawn: NDArray[np.uint8], found: NDArray[np.uint8], likely: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What was drawn, and the likeliest of the other labels where nobody drew.

    Where the segmenter would have a drawn structure and the person had none, its next guess counts.
    """
    filled = drawn.copy()
    for phase, frame in enumerate(drawn):
        labelled = is_heart(frame).any(axis=(1, 2))
        shown = np.flatnonzero(labelled)
        of_frame = [label for label in STRUCTURES if (frame == label).any()]
        for index, image in enumerate(frame):
            unknown = image == NOT_DRAWN
            if not unknown.any():
                continue
            passed_over = len(shown) > 0 and shown[0] < index < shown[-1] and not labelled[index]
            if passed_over or not of_frame:
                guess = found[phase, index]
            else:
                allowed = [label for label in range(LV + 1) if label not in of_frame]
                guess = np.array(allowed, np.uint8)[likely[phase, index, allowed].argmax(axis=0)]
                heart = is_heart(image) | is_heart(found[phase, index])
                guess = np.where(_touching(guess > 0, is_heart(image)) & heart, guess, 0)
                if not labelled[index]:
                    guess = np.zeros_like(guess)  # beyond what somebody drew
            filled[phase, index][unknown] = guess[unknown]
    return filled


def _is_plausible(masks: NDArray[np.uint8], spacing_mm: NDArray[np.float32]) -> bool:
    """Length, volume and ejection fraction of a left ventricle in its muscle."""
    slices = (masks == LV).any(axis=(2, 3)).sum(axis=1)
    volume_ml = np.count_nonzero(masks[ED] == LV) * float(np.prod(spacing_mm)) / 1000
    return bool(
        all(slices[phase] * spacing_mm[0] >= MIN_LENGTH_MM[phase] for phase in (ED, ES))
        and VOLUME_ML[0] <= volume_ml <= VOLUME_ML[1]
        and EF_RANGE[0] <= ejection_fraction(masks) <= EF_RANGE[1]
        and all(myocardium_at_border(phase) >= MIN_MYOCARDIUM_AT_BORDER for phase in masks)
    )


def with_contours(case: Case, segmenter: Path | None = None) -> tuple[Case, str]:
    """The case with automatic contours where they are kept, and the code of `Contours`."""
    found = find_contours(case, segmenter)
    if not found.kept:
        return case, found.code
    return replace(case, info=replace(case.info, contours="auto"), masks=found.masks), found.code
