"""Five folds of a synthetic data set: a patient's images are in one, so that no tool tests on what it trained on.

Patients are independent and their order says nothing, so they go to the folds in turn.
"""

from collections.abc import Sequence

from fedcmr.shared.case import Case

NUM_FOLDS = 5


def folds(cases: Sequence[Case]) -> dict[str, int]:
    """The fold of each patient, 0 to 4, by pseudonym."""
    return {case.info.pseudonym: number % NUM_FOLDS for number, case in enumerate(cases)}
