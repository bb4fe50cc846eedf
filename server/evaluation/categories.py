"""Classes of the ejection fraction, and how often a prediction falls into the right one.

The classes are those of heart failure by ejection fraction in the universal definition (Bozkurt et al. 2021,
https://doi.org/10.1002/ejhf.2115): reduced, at most 40 %; mildly reduced, 41 to 49 %; preserved, at least 50 %. They
are written for whole per cents. A fraction is continuous, so the middle class is all that lies between the outer two,
0.40 < EF < 0.50: nothing is rounded into another class, and none is lost between 40 and 41 or 49 and 50. Only the
number is classified; it does not say whether a patient has heart failure.
"""

import numpy as np
from numpy.typing import NDArray

CATEGORIES = ("reduced", "mildly reduced", "preserved")
REDUCED_MAX, PRESERVED_MIN = 0.40, 0.50
NUM_CATEGORIES = len(CATEGORIES)
DISAGREEMENT = np.abs(np.subtract.outer(range(NUM_CATEGORIES), range(NUM_CATEGORIES))) / (NUM_CATEGORIES - 1)
"""Cohen's linear weights: 0 for the same class, 1 for the two ends."""


def category_of(efs: NDArray[np.floating]) -> NDArray[np.int64]:
    """Index into `CATEGORIES` of each ejection fraction, which must be finite."""
    return (efs > REDUCED_MAX).astype(np.int64) + (efs >= PRESERVED_MIN)


def category_figures(
    truth: NDArray[np.float64], guess: NDArray[np.float64], weights: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Agreement of every weighting of the patients.

    Cohen (1968), Weighted kappa, Psychological Bulletin 70, 213-220: 1 - observed / expected disagreement, where the
    expected one is that of predictions and truths paired at random.

    Args:
        truth: Shape (N,), finite.
        guess: Shape (N,), finite.
        weights: Shape (B, N), how often each patient was drawn; rows sum to N.

    Returns:
        Share of the patients in the right class, in [0, 1], and linearly weighted kappa, in [-1, 1], NaN where
        predictions and truths are all of one and the same class; shape (B,) each.
    """
    of_truth, of_guess = category_of(truth), category_of(guess)
    one_hot = np.eye(NUM_CATEGORIES)
    right, apart = of_truth == of_guess, DISAGREEMENT[of_truth, of_guess]
    columns = np.column_stack([right, apart, one_hot[of_truth], one_hot[of_guess]])
    shares = weights @ columns / len(truth)
    agreement, observed = shares[:, 0], shares[:, 1]
    shares_true, shares_guessed = shares[:, 2 : 2 + NUM_CATEGORIES], shares[:, 2 + NUM_CATEGORIES :]
    expected = np.einsum("bj,jk,bk->b", shares_true, DISAGREEMENT, shares_guessed)
    with np.errstate(divide="ignore", invalid="ignore"):
        kappa = np.where(expected > 0, 1 - observed / expected, np.nan)
    return agreement, kappa
