"""The two-step mean of style vectors: unbiased where nothing is clipped, and with exactly the noise that is claimed."""

import numpy as np
import pytest

from fedcmr.shared.privacy import clip_to_norm, os_generator
from fedcmr.shared.style_statistics import SECOND_NORM, noise_std, two_step_mean


def styles_of(num, scale=0.2, centre=0.3, seed=0):
    return np.random.default_rng(seed).normal(centre, scale, (num, 11))


def test_without_noise_and_clipping_they_are_numpys():
    styles = styles_of(30)
    mean, square = two_step_mean(styles, 10.0, 0.0, 30, None)
    np.testing.assert_allclose(mean, styles.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(square, (styles**2).mean(axis=0), atol=1e-12)


@pytest.mark.slow
def test_their_noise_is_the_claimed_one_and_their_variance_unbiased():
    styles, clip, noise, nominal = styles_of(40), 4.0, 1.0, 40
    released = [two_step_mean(styles, clip, noise, nominal, os_generator()) for _ in range(3000)]
    means = np.array([mean for mean, _ in released])
    variances = np.array([square - mean**2 for mean, square in released])
    mean_std, variance_std = noise_std(clip, noise, nominal)
    assert means.std(axis=0).mean() == pytest.approx(mean_std, rel=0.02)
    assert variances.std(axis=0).mean() == pytest.approx(
        variance_std, rel=0.05
    )  # and a little from the offset's square
    np.testing.assert_allclose(means.mean(axis=0), styles.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(variances.mean(axis=0), styles.var(axis=0), atol=0.012)


class Recorder:
    """A noise source without noise that notes what it was asked for."""

    def __init__(self):
        self.scales = []

    def normal(self, loc, scale, size):
        self.scales.append(scale)
        return np.zeros(size)


@pytest.mark.parametrize("outlier", [np.full(11, 1e9), np.full(11, np.nan), np.eye(11)[0] * 4.0])
def test_one_patient_moves_each_look_by_no_more_than_its_clip(outlier, monkeypatch):
    """Sums of both steps, with and without a patient; the second at the same centre, as its privacy is counted."""
    sums = []

    def spy(per_patient, clip, noise_multiplier, dimension, rng):
        total = sum((clip_to_norm(vector, clip) for vector in per_patient), start=np.zeros(dimension))
        sums.append((clip, total))
        # The centre that both are given: without the patient's own influence on it.
        return np.zeros(dimension) if len(sums) % 2 else total

    monkeypatch.setattr("fedcmr.shared.privacy.private_sum", spy)
    styles = styles_of(10)
    two_step_mean(styles, 4.0, 1.0, 10, None)
    two_step_mean(np.vstack([styles, outlier]), 4.0, 1.0, 10, None)
    for (clip, without), (_, with_patient) in zip(sums[:2], sums[2:], strict=True):
        assert np.linalg.norm(with_patient - without) <= clip * (1 + 1e-9)
    assert [clip for clip, _ in sums] == [4.0, 1.0, 4.0, 1.0]


def test_both_looks_draw_the_noise_that_is_charged():
    recorder = Recorder()
    two_step_mean(styles_of(10), 4.0, 1.5, 10, recorder)
    assert recorder.scales == [1.5 * 4.0, 1.5 * 1.0], "noise multiplier times the step's own bound"


def test_a_narrower_second_look_measures_a_far_vendor_where_a_single_one_could_not():
    styles = styles_of(40, scale=0.3, centre=1.0)  # far from the public mean: squares of 1 around a variance of 0.09
    errors = [
        (square - mean**2 - styles.var(axis=0))
        for mean, square in (two_step_mean(styles, 4.0, 0.96, 40, os_generator()) for _ in range(200))
    ]
    single = 0.68 * np.sqrt(2) * 4.0**2 / 2 / 40  # noise of the square in one step with the same budget
    assert np.std(errors) < 0.6 * single
    assert SECOND_NORM < 1
