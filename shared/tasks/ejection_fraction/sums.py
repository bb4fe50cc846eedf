"""What a site's test patients add up to: a model's errors as a few sums per vendor, plain or private.

The plain sums of a group of patients are those of `SUMS`; every figure of a table (mean absolute error, bias,
mean squared error, r2) follows from them, and those of several sites add up. The private form is one Gaussian mechanism
over the same sums, each shifted and scaled by public constants first, so that noise of one size fits all of them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcmr.shared.privacy import FloatArray, Rng, private_sum

SUMS = ("count", "error", "absolute_error", "squared_error", "ef", "squared_ef")
"""Per patient: 1, predicted - true ejection fraction, its absolute value, its square, the true one, and its square."""
ERROR_BOUND = 0.3
"""Errors beyond +-30 EF points count as 30 in the private form: public, and wider than nearly all of a usable model."""
EF_RANGE = (0.1, 0.9)
"""True ejection fractions beyond count as its ends in the private form."""
EF_CENTRE = 0.5
ERROR_CENTRE, SQUARE_CENTRE, SPREAD_CENTRE = 0.06, 0.006, 0.03
"""Public guesses of the mean absolute error, the mean squared error and the variance of ejection fractions. What is
summed is the difference to them: it is small where they are near the truth, and then the noise in the count matters
little. A wrong guess costs precision and no privacy."""
WEIGHTS = (0.30, 0.55, 0.55, 0.35, 0.25, 0.33)
"""Share of each sum in a patient's vector, whose squares add up to at most 1: the errors matter most."""
MIN_GROUP = 5
"""The plain form leaves out groups of fewer patients."""
PLAIN_DIGITS = 3
"""Decimals of the plain form's sums: a tenth of an EF point in the sum over a group."""

SumsByVendor = dict[str, NDArray[np.float64]]
"""Vendor -> shape (6,), in the order of `SUMS`."""


class PatientError(NamedTuple):
    """One patient's errors.

    Attributes:
        vendor: Under which the patient counts.
        true: Ejection fraction in [0, 1].
        predicted: The model's prediction; NaN or infinite where it gave no number.
    """

    vendor: str
    true: float
    predicted: float


def _scaling() -> tuple[FloatArray, FloatArray]:
    """The linear map from the plain sums to the released ones, shape (6, 6), and its inverse."""
    count, error, absolute, squared, ef, squared_ef = np.eye(len(SUMS))
    half = max(EF_CENTRE - EF_RANGE[0], EF_RANGE[1] - EF_CENTRE)
    spread = squared_ef - 2 * EF_CENTRE * ef + EF_CENTRE**2 * count  # (ef - centre)^2
    rows = [
        count,
        error / ERROR_BOUND,
        (absolute - ERROR_CENTRE * count) / (ERROR_BOUND - ERROR_CENTRE),
        (squared - SQUARE_CENTRE * count) / (ERROR_BOUND**2 - SQUARE_CENTRE),
        (ef - EF_CENTRE * count) / half,
        (spread - SPREAD_CENTRE * count) / (half**2 - SPREAD_CENTRE),
    ]
    scale = np.array(WEIGHTS)[:, None] * np.array(rows)
    return scale, np.linalg.inv(scale)


SCALE, UNSCALE = _scaling()


def plain_terms(
    patient: PatientError, error_bound: float = 1.0, ef_range: tuple[float, float] = (0.0, 1.0)
) -> FloatArray:
    """The terms of `SUMS` of one patient, shape (6,), finite whatever the model said.

    A prediction that is not a number counts as the largest error.
    """
    true = min(max(patient.true, ef_range[0]), ef_range[1])
    predicted = min(max(patient.predicted, 0.0), 1.0) if np.isfinite(patient.predicted) else np.inf
    error = min(max(predicted - patient.true, -error_bound), error_bound)
    return np.array([1.0, error, abs(error), error**2, true, true**2])


def patient_vector(patient: PatientError, vendors: Sequence[str]) -> FloatArray:
    """A patient's whole contribution to the private form, shape (6 V,), of L2 norm <= 1; zeros but for one vendor."""
    vector = np.zeros((len(vendors), len(SUMS)))
    vector[vendors.index(patient.vendor)] = SCALE @ plain_terms(patient, ERROR_BOUND, EF_RANGE)
    return vector.ravel()


def private_table(
    patients: Sequence[PatientError], vendors: Sequence[str], noise_multiplier: float, rng: Rng
) -> SumsByVendor:
    """The private form: scaled sums with noise; `from_private` brings them back to those of `SUMS`.

    Guarantees:
        One step of a `Release` with this noise multiplier, sample rate 1: adding or removing one patient moves the
        sums of all vendors together by at most 1 in the L2 norm, whatever the model predicts and whatever the patient's
        ejection fraction is, and each number gets noise N(0, noise_multiplier^2). Shape, names and finiteness do not
        depend on the patients; where there are none, noise alone is released.

    Args:
        patients: One entry per patient, each of one of `vendors`.
        vendors: Vendors that the site declares in public.
        noise_multiplier: > 0.
        rng: From `fedcmr.shared.privacy.os_generator`.
    """
    vectors = [patient_vector(patient, vendors) for patient in patients]
    noised = private_sum(vectors, 1.0, noise_multiplier, len(SUMS) * len(vendors), rng)
    return dict(zip(vendors, noised.reshape(len(vendors), len(SUMS)), strict=True))


def plain_table(patients: Sequence[PatientError], vendors: Sequence[str]) -> SumsByVendor:
    """The plain form: not private. Vendors with fewer than `MIN_GROUP` patients are all zeros.

    There is no total next to the vendors, so that nothing can be found by subtraction within one table.
    """
    table = {}
    for vendor in vendors:
        rows = [plain_terms(patient) for patient in patients if patient.vendor == vendor]
        shown = np.sum(rows, axis=0) if len(rows) >= MIN_GROUP else np.zeros(len(SUMS))
        table[vendor] = np.round(shown, PLAIN_DIGITS)
    return table


def from_private(
    released: Mapping[str, NDArray[np.floating]], noise_multiplier: float
) -> tuple[SumsByVendor, NDArray[np.float64]]:
    """The sums of `SUMS` out of `private_table`'s, and the covariance of the noise in each vendor's, shape (6, 6)."""
    sums = {vendor: UNSCALE @ np.asarray(row, np.float64) for vendor, row in released.items()}
    return sums, noise_multiplier**2 * UNSCALE @ UNSCALE.T
