"""Private appearance statistics: the mean and the spread of a site's codes, from two looks at its patients.

The first look finds the centre under a wide clip. The second looks around that centre, where the codes are short, under
a narrow clip: its noise is smaller in proportion, and the spread is no longer a small difference of large numbers.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.privacy import FloatArray, Rng, private_mean_gradient, private_moments

NUM_LOOKS = 2
"""Steps of the release: both looks have the same noise multiplier and see every patient."""
SECOND_CLIP = 0.6
"""Clip of the second look over that of the first. Smaller means less noise and, for vendors whose patients differ much,
a spread that comes out too small: the public development patients lose an eighth of theirs at 0.6."""


def two_looks(
    codes: FloatArray,
    clip: float,
    noise_multiplier: float,
    nominal_patients: int | NDArray[np.int_],
    rng: Rng | None,
    known: NDArray[np.bool_] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Mean and mean square of the patients' appearance codes.

    A site with scanners of V vendors gives every patient's codes of all of them as one row of V x K entries, divides
    each by its own vendor's nominal number, and says with `known` which a patient has: what is not known counts as zero
    in both looks. The clip is one for the whole row, so that a patient with scans of two vendors weighs no more than
    one with scans of one.

    Guarantees: two steps of a `fedcmr.shared.privacy.Release` with this noise multiplier and sample rate 1, the second
    chosen in the light of the first. All that follows the two sums uses nothing but them and public numbers.

    Args:
        codes: Shape (N, D), standardised units; a row with NaN or infinity counts as zero.
        clip: L2 bound of a row in the first look.
        noise_multiplier: As in `fedcmr.shared.privacy.private_sum`, of each look.
        nominal_patients: A public constant that divides the sums, or one per entry, shape (D,).
        rng: As in `fedcmr.shared.privacy.private_sum`.
        known: Shape (N, D): which entries a patient has; None for all.

    Returns:
        Shape (D,) each. The mean square less the mean's square is an unbiased variance but for clipping, and may be
        negative by chance; its noise is `noise_std`'s.
    """
    size = codes.shape[1]
    present = np.ones(codes.shape, bool) if known is None else known
    seen = np.where(present, codes, 0.0)
    total = private_mean_gradient(seen, clip, noise_multiplier, expected_batch_size=1, dimension=size, rng=rng)
    centre = total / nominal_patients
    narrow = SECOND_CLIP * clip
    around = np.where(present, codes - centre, 0.0)  # not the centre's negative where there is nothing to compare
    offset, square = private_moments(around, narrow, noise_multiplier, nominal_patients, rng)
    # Both looks measured the mean: weights are the inverse of their noises' variances, 2 narrow^2 and clip^2.
    weight = 1 / (1 + 2 * SECOND_CLIP**2)
    mean = centre + weight * offset
    # The noise in the offset adds its own variance to the offset's square.
    variance = square - offset**2 + _offset_std(clip, noise_multiplier, nominal_patients) ** 2
    return mean, variance + mean**2


def noise_std(clip: float, noise_multiplier: float, nominal_patients: int) -> tuple[float, float]:
    """Standard deviation of the noise in each entry of the mean, and of the variance, that follow from `two_looks`."""
    second = float(_offset_std(clip, noise_multiplier, nominal_patients))
    first = clip * noise_multiplier / nominal_patients
    if first == 0:
        return 0.0, 0.0
    # Squares are clipped to half the narrow clip's square.
    return first * second / math.hypot(first, second), second * SECOND_CLIP * clip / 2


def _offset_std(clip: float, noise_multiplier: float, nominal_patients: int | NDArray[np.int_]) -> FloatArray:
    """Noise of the second look's mean: `private_moments` gives half its budget to the mean, half to the squares."""
    return np.asarray(math.sqrt(2) * SECOND_CLIP * clip * noise_multiplier / nominal_patients)
