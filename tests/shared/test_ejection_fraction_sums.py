"""Sums over test patients: one patient's part is bounded, the noise is as charged, and small groups are not shown."""

import math

import numpy as np
import pytest

from fedcmr.shared.privacy import os_generator
from fedcmr.shared.tasks.ejection_fraction.sums import (
    MIN_GROUP,
    SUMS,
    WEIGHTS,
    PatientError,
    from_private,
    patient_vector,
    plain_table,
    private_table,
)

VENDORS = ("GE", "Siemens")
ODD = (0.0, 0.3, 0.61, 1.0, -5.0, 7.0, 1e300, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("true", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("predicted", ODD)
def test_no_patient_moves_the_private_sums_by_more_than_one(true, predicted):
    vector = patient_vector(PatientError("GE", true, predicted), VENDORS)
    assert np.isfinite(vector).all() and np.linalg.norm(vector) <= 1
    assert not vector[len(SUMS) :].any(), "the other vendor's sums are untouched"
    assert sum(weight**2 for weight in WEIGHTS) <= 1


def test_a_prediction_that_is_no_number_is_the_largest_error():
    assert np.array_equal(
        patient_vector(PatientError("GE", 0.5, math.nan), VENDORS),
        patient_vector(PatientError("GE", 0.5, 0.9), VENDORS),
    )


def test_the_private_form_has_the_noise_that_is_charged_also_without_patients():
    noise = 1.7
    draws = np.array([np.ravel([*private_table([], VENDORS, noise, os_generator()).values()]) for _ in range(3000)])
    assert draws.shape[1] == len(SUMS) * len(VENDORS)
    np.testing.assert_allclose(draws.std(axis=0), noise, rtol=0.06)
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.15)


def test_what_comes_back_is_the_sums_and_the_covariance_of_their_noise():
    rng = np.random.default_rng(0)
    patients = [
        PatientError("GE", true, true + error)
        for true, error in zip(rng.uniform(0.2, 0.8, 30), rng.uniform(-0.2, 0.2, 30), strict=True)
    ]
    plain = plain_table(patients, VENDORS)["GE"]
    exact, _ = from_private({"GE": sum(patient_vector(p, ("GE",)) for p in patients)}, 1.0)
    np.testing.assert_allclose(exact["GE"], plain, atol=1e-3)
    draws = []
    for _ in range(3000):
        sums, covariance = from_private(private_table(patients, VENDORS, 0.5, os_generator()), 0.5)
        draws.append(sums["GE"])
    np.testing.assert_allclose(np.std(draws, axis=0), np.sqrt(np.diag(covariance)), rtol=0.06)


def test_groups_of_fewer_than_five_are_not_in_the_plain_table():
    few = [PatientError("GE", 0.5, 0.6)] * (MIN_GROUP - 1)
    table = plain_table([*few, *[PatientError("Siemens", 0.5, 0.61234567)] * MIN_GROUP], VENDORS)
    assert not table["GE"].any()
    assert table["Siemens"][0] == MIN_GROUP == 5
    assert set(table) == set(VENDORS), "no total, from which the left out could be found"
    assert all(round(value, 3) == value for value in table["Siemens"])
