"""Private style statistics: the mean and the spread of a site's style vectors, by a two-step private mean.

The first step finds the centre under a wide clip. The second clips around that centre, where the vectors are short,
under a narrow clip: its noise is smaller in proportion, and the spread is no longer a small difference of large
numbers.

This is the idea of CoinPress, Biswas et al. (2020), https://arxiv.org/abs/2006.06618, Algorithm 1 with two steps: clip
to a ball, add Gaussian noise, and take the next, smaller ball around the noisy mean. What differs:

    - the second ball's radius is a fixed share of the first, measured on public patients. CoinPress derives it from a
      bound on the covariance, the number of patients and the noise, with a probability that the mean lies inside;
    - both steps have the same noise multiplier, and the mean is that of both, weighted by their noise. CoinPress spends
      most of the budget on the last step and returns that step's mean alone;
    - the second step also releases the mean squares, from which the spread of each entry follows. CoinPress has an
      iteration of its own for the whole covariance;
    - neighbours differ by one patient more or less, and sums are divided by a public number. CoinPress replaces one
      of n patients and divides by n.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.privacy import FloatArray, Rng, private_mean_gradient, private_moments

NUM_STEPS = 2
"""Steps of the release: both have the same noise multiplier and see every patient."""
SECOND_NORM = 0.6
"""Clip of the second step over that of the first. Smaller means less noise and, for vendors whose patients differ much,
a spread that comes out too small: the public development patients lose an eighth of theirs at 0.6."""


def two_step_mean(
    styles: FloatArray,
    max_grad_norm: float,
    noise_multiplier: float,
    nominal_patients: int | NDArray[np.int_],
    rng: Rng | None,
    known: NDArray[np.bool_] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Mean and mean square of the patients' style vectors.

    A site with scanners of V vendors gives every patient's vectors of all of them as one row of V x K entries, divides
    each by its own vendor's nominal number, and says with `known` which a patient has: what is not known counts as zero
    in both steps. The clip is one for the whole row, so that a patient with scans of two vendors weighs no more than
    one with scans of one.

    Guarantees: two steps of a `fedcmr.shared.privacy.Release` with this noise multiplier and sample rate 1, the second
    chosen in the light of the first. All that follows the two sums uses nothing but them and public numbers.

    Args:
        styles: Shape (N, D), standardised units; a row with NaN or infinity counts as zero.
        max_grad_norm: L2 bound of a row in the first step.
        noise_multiplier: As in `fedcmr.shared.privacy.private_sum`, of each step.
        nominal_patients: A public constant that divides the sums, or one per entry, shape (D,).
        rng: As in `fedcmr.shared.privacy.private_sum`.
        known: Shape (N, D): which entries a patient has; None for all.

    Returns:
        Shape (D,) each. The mean square less the mean's square is an unbiased variance but for clipping, and may be
        negative by chance; its noise is `noise_std`'s.
    """
    size = styles.shape[1]
    present = np.ones(styles.shape, bool) if known is None else known
    seen = np.where(present, styles, 0.0)
    total = private_mean_gradient(seen, max_grad_norm, noise_multiplier, expected_batch_size=1, dimension=size, rng=rng)
    centre = total / nominal_patients
    narrow = SECOND_NORM * max_grad_norm
    around = np.where(present, styles - centre, 0.0)  # not the centre's negative where there is nothing to compare
    offset, square = private_moments(around, narrow, noise_multiplier, nominal_patients, rng)
    # Both steps measured the mean: weights are the inverse of their noises' variances, 2 narrow^2 and max_grad_norm^2.
    weight = 1 / (1 + 2 * SECOND_NORM**2)
    mean = centre + weight * offset
    # The noise in the offset adds its own variance to the offset's square.
    variance = square - offset**2 + _offset_std(max_grad_norm, noise_multiplier, nominal_patients) ** 2
    return mean, variance + mean**2


def noise_std(max_grad_norm: float, noise_multiplier: float, nominal_patients: int) -> tuple[float, float]:
    """Standard deviation of the noise in each entry of the mean, and of the variance, that `two_step_mean` gives."""
    second = float(_offset_std(max_grad_norm, noise_multiplier, nominal_patients))
    first = max_grad_norm * noise_multiplier / nominal_patients
    if first == 0:
        return 0.0, 0.0
    # Squares are clipped to half the narrow clip's square.
    return first * second / math.hypot(first, second), second * SECOND_NORM * max_grad_norm / 2


def _offset_std(max_grad_norm: float, noise_multiplier: float, nominal_patients: int | NDArray[np.int_]) -> FloatArray:
    """Noise of the second step's mean: `private_moments` gives half its budget to the mean, half to the squares."""
    return np.asarray(math.sqrt(2) * SECOND_NORM * max_grad_norm * noise_multiplier / nominal_patients)
