"""Five folds of a synthetic data set, so that no tool tests on what it trained on.

What belongs together is in one fold: a patient's images, and the patients who were made from one scan. Otherwise they
are independent and their order says nothing, so they go to the folds in turn.
"""

from collections.abc import Sequence

from fedcmr.shared.case import Case

NUM_FOLDS = 5


def folds(cases: Sequence[Case]) -> dict[str, int]:
    """The fold of each patient, 0 to 4, by pseudonym."""
    groups = dict.fromkeys(case.info.group for case in cases)
    fold_of = {group: number % NUM_FOLDS for number, group in enumerate(groups)}
    return {case.info.pseudonym: fold_of[case.info.group] for case in cases}
