"""From which cases a segmenter can learn: at the sites and at the coordinator the same ones."""

from fedcmr.shared.case import BACKGROUND, ED, ES, LV, MYO, NOT_DRAWN, RV, Case


def is_segmented(case: Case) -> bool:
    """Whether the masks are whole: all is drawn, each structure is somewhere in the stack at ED and at ES.

    Masks that are empty in a frame, or contain cavities only, are incomplete: the structures were not drawn. Slices
    without any label within a segmented frame lie beyond the heart.
    """
    if case.info.contours == "auto" or (case.masks == NOT_DRAWN).any():
        return False  # what a program found is no truth
    return all((case.masks[phase] == label).any() for phase in (ED, ES) for label in (RV, MYO, LV))


def can_teach(case: Case) -> bool:
    """Whether a segmenter can learn from the masks: they are whole, or what was not drawn is marked `NOT_DRAWN`.

    Of such a case the drawn structures are learnt (`fedcmr.shared.tasks.segmentation.losses`). Where a structure is
    missing without that mark, as in masks of earlier versions, it would be learnt as background.
    """
    undrawn = case.masks == NOT_DRAWN
    in_part = bool(undrawn.any()) and case.info.contours != "auto"
    return is_segmented(case) or bool(in_part and (case.masks[~undrawn] != BACKGROUND).any())
