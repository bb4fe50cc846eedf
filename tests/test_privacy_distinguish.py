"""The mechanism itself against its claim: many draws with and without one worst-case patient, told apart at best.

The audit with canaries runs a whole study once; here one release is drawn ten thousand times. Each statistic raises a
false alarm once in a million; the file has fewer than forty.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import beta, chi2, kstest, norm

from fedcmr.client import training
from fedcmr.client.training import Execution, LocalSteps, Patient, fine_tune
from fedcmr.shared import privacy
from fedcmr.shared.privacy import (
    Mechanism,
    Release,
    clip_to_norm,
    epsilon,
    moment_vectors,
    os_generator,
    private_mean_gradient,
)
from fedcmr.shared.style_statistics import SECOND_NORM, two_step_mean
from fedcmr.simulations.audit.one_run import gaussian_mu

pytestmark = pytest.mark.slow

ALARM = 1e-6
DRAWS, CLIP, SIGMA, NOMINAL = 10_000, 0.03, 0.8, 40
OTHERS = [np.array([0.01, -0.02, 0.0, 0.005]), np.array([-3.0, 1.0, 0.0, 2.0])]
WORST = np.array([1e9, 0.0, 0.0, 0.0])


def least_mu(without: np.ndarray, present: np.ndarray) -> float:
    """No mu-private Gaussian mechanism with a smaller mu is told apart like this; wrong with probability `ALARM`.

    Log likelihood ratios, guessed "present" above 0; rates of both errors from above by Clopper and Pearson (1934).
    """
    errors = (int((without > 0).sum()), int((present <= 0).sum()))
    false_alarms, misses = (beta.ppf(1 - ALARM / 2, count + 1, len(without) - count) for count in errors)
    return float(-ndtri(false_alarms) - ndtri(misses))


def claimed_mu(release: Release, delta: float = 1e-5) -> float:
    """Of the epsilon that a site's ledger would charge."""
    return gaussian_mu(epsilon([release], delta)[0], delta)


def check_noise(noise: np.ndarray) -> None:
    """Shape (draws, D), in units of what was promised: standard normal, coordinates and draws independent."""
    total, freedom = float((noise**2).sum()), noise.size
    assert chi2.ppf(ALARM / 2, freedom) < total < chi2.ppf(1 - ALARM / 2, freedom), "spread of the noise"
    assert kstest(noise.ravel(), "norm").pvalue > ALARM, "shape of the noise"
    pairs = np.triu_indices(noise.shape[1], 1)
    between = np.corrcoef(noise.T)[pairs]
    following = [np.corrcoef(noise[:-1, k], noise[1:, k])[0, 1] for k in range(noise.shape[1])]
    found = np.abs([*between, *following])
    assert found.max() < norm.isf(ALARM / 2 / len(found)) / math.sqrt(len(noise)), "independence of the noise"


def steps(*patients: np.ndarray) -> np.ndarray:
    """Sums of `DRAWS` gradient steps, shape (`DRAWS`, 4), in units of the clip."""
    rng = os_generator()
    draws = [
        private_mean_gradient(list(patients), CLIP, SIGMA, expected_batch_size=NOMINAL, dimension=4, rng=rng)
        for _ in range(DRAWS)
    ]
    return np.array(draws) * NOMINAL / CLIP


def check_gradient_step() -> None:
    expected = sum(vector * min(1, CLIP / np.linalg.norm(vector)) for vector in OTHERS) / CLIP
    without, present = (steps(*patients) - expected for patients in (OTHERS, [*OTHERS, WORST]))
    check_noise(without / SIGMA)
    found = least_mu(*((x[:, 0] - 1 / 2) / SIGMA**2 for x in (without, present)))
    claim = claimed_mu(Release(SIGMA, 1.0, 1))
    assert found <= claim, "a patient weighs more than is claimed"
    assert found > 0.85 * claim, "the attack is too weak to have found anything"


def looks_ratio(monkeypatch, present: bool) -> float:
    """Log likelihood ratio of one release of style statistics: who sees both noised sums as they are, not only what
    is made of them, and knows all other patients. The worst-case patient has scans of two vendors.
    """
    clip = 4.0
    others = np.array([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 2.0, -7.0]])
    worst = np.array([1e6, 0.0, 1e6, 0.0])
    seen: list[np.ndarray] = []
    original = privacy.private_sum
    with monkeypatch.context() as patch:
        patch.setattr(privacy, "private_sum", lambda *args: (seen.append(original(*args)), seen[-1])[1])
        codes = np.vstack([others, worst]) if present else others
        two_step_mean(codes, clip, SIGMA, np.full(4, 5), os_generator(), np.ones(codes.shape, bool))
    centre = seen[0] / 5
    first = np.array([clip_to_norm(code, clip) / clip for code in (*others, worst)])
    second = moment_vectors(np.vstack([others, worst]) - centre, SECOND_NORM * clip)
    ratio = 0.0
    for released, vectors in ((seen[0] / clip, first), (seen[1], second)):
        shift, rest = vectors[-1], released - vectors[:-1].sum(axis=0)
        ratio += float(rest @ shift - shift @ shift / 2) / SIGMA**2
    return ratio


def check_two_step_mean(monkeypatch) -> None:
    without, present = (np.array([looks_ratio(monkeypatch, there) for _ in range(5000)]) for there in (False, True))
    found, claim = least_mu(without, present), claimed_mu(Release(SIGMA, 1.0, 2))
    assert found <= claim, "a patient weighs more than is claimed"
    assert found > 0.85 * claim, "the attack is too weak to have found anything"


def check_site(prior) -> None:
    """Two steps of a site's own code, whose gradients are the others' without the network."""
    mechanism = Mechanism(SIGMA, 1.0, 2, CLIP, 1e-3, private=True, nominal_patients=2)
    start = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    how = LocalSteps(learning_rate=1.0, num_views=1, seed=0, server_round=2)
    blank = torch.zeros(1, 2, 64, 64)
    patient = Patient("p", blank, blank.byte(), torch.zeros(1, 11), torch.zeros(1, dtype=torch.int64))
    updates = [
        fine_tune(prior.generator, [patient], start, mechanism, how, Execution(torch.device("cpu"))) for _ in range(60)
    ]
    flat = np.array([np.concatenate([update[name].ravel() for name in start]) for update in updates]).astype(float)
    check_noise((flat * 2 / (SIGMA * CLIP * math.sqrt(2))).reshape(-1, 4))


@pytest.fixture
def no_network(monkeypatch):
    """The gradient of every patient is zero, so that what a site releases is its noise."""
    monkeypatch.setattr(
        training,
        "patient_gradient",
        lambda _, __, ___, ____, parameters: np.zeros(sum(parameter.numel() for parameter in parameters)),
    )


def test_a_gradient_step_is_told_apart_as_well_as_its_epsilon_says_and_no_better():
    check_gradient_step()


def test_two_step_mean_at_a_patient_of_two_vendors_are_told_apart_as_their_epsilon_says_and_no_better(monkeypatch):
    check_two_step_mean(monkeypatch)


def test_the_noise_of_a_sites_steps_is_independent_from_step_to_step(prior, no_network):
    check_site(prior)


def half_the_noise(monkeypatch) -> None:
    original = privacy.private_sum
    monkeypatch.setattr(
        privacy,
        "private_sum",
        lambda per_patient, clip, noise, dimension, rng: original(per_patient, clip, noise / 2, dimension, rng),
    )


def twice_the_clip(monkeypatch) -> None:
    original = privacy.private_sum
    monkeypatch.setattr(
        privacy,
        "private_sum",
        lambda per_patient, clip, noise, dimension, rng: original(per_patient, 2 * clip, noise / 2, dimension, rng),
    )


def no_clip(monkeypatch) -> None:
    monkeypatch.setattr(privacy, "clip_to_norm", lambda vector, clip: np.asarray(vector, np.float64))


@pytest.mark.parametrize(
    ("broken", "told"),
    [(half_the_noise, "spread"), (twice_the_clip, "spread|weighs more"), (no_clip, "spread|weighs more")],
)
def test_a_broken_gradient_step_is_caught(monkeypatch, broken, told):
    broken(monkeypatch)
    with pytest.raises(AssertionError, match=told):
        check_gradient_step()


@pytest.mark.parametrize("broken", [half_the_noise, twice_the_clip])
def test_broken_looks_are_caught(monkeypatch, broken):
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="weighs more"):
        check_two_step_mean(monkeypatch)


def test_a_patient_of_two_vendors_that_is_clipped_for_each_is_caught(monkeypatch):
    """Two clips of one patient are twice the weight: what a vendor's own clip would be."""
    original = privacy.clip_to_norm

    def each(vector, clip):
        if len(vector) != 4:
            return original(vector, clip)
        return np.concatenate([original(vector[:2], clip), original(vector[2:], clip)])

    monkeypatch.setattr(privacy, "clip_to_norm", each)
    monkeypatch.setattr("tests.test_privacy_distinguish.clip_to_norm", each)
    with pytest.raises(AssertionError, match="weighs more"):
        check_two_step_mean(monkeypatch)


def test_noise_that_is_used_again_is_caught(prior, no_network, monkeypatch):
    class Stuck:
        """Says the same for ever."""

        def random(self, size):
            return np.random.default_rng(0).random(size)

        def normal(self, loc, scale, size):
            return np.random.default_rng(0).normal(loc, scale, size)

    monkeypatch.setattr(training, "os_generator", Stuck)
    with pytest.raises(AssertionError, match="noise"):
        check_site(prior)
    monkeypatch.setattr("tests.test_privacy_distinguish.os_generator", Stuck)
    with pytest.raises(AssertionError, match="noise"):
        check_gradient_step()


def test_the_bound_on_mu_is_wrong_as_seldom_as_it_says_and_close():
    """A Gaussian mechanism of known mu; at a confidence that can be counted, many repetitions."""
    rng = np.random.default_rng(0)
    for mu in (0.5, 1.25, 3.0):
        bounds = []
        for _ in range(50):
            without, present = rng.normal(0, 1, 5000), rng.normal(mu, 1, 5000)
            bounds.append(least_mu(mu * without - mu**2 / 2, mu * present - mu**2 / 2))
        assert max(bounds) <= mu and np.median(bounds) > mu - 0.3


def test_no_vector_however_odd_is_longer_than_the_clip():
    rng = np.random.default_rng(0)
    odd = [
        [1e308] * 11,
        [1e-320] * 11,
        [np.nan, *[0.0] * 10],
        [np.inf, *[0.0] * 10],
        [-1e308, *[1e308] * 10],
        [5e-324, *[0.0] * 10],
        [-0.0] * 11,
    ]
    sizes = 10.0 ** rng.uniform(-300, 300, 5000)
    vectors = np.vstack([odd, rng.normal(size=(5000, 11)) * sizes[:, None]])
    for clip in (CLIP, 4.0):
        clipped = np.array([clip_to_norm(vector, clip) for vector in vectors])
        assert np.isfinite(clipped).all() and np.linalg.norm(clipped, axis=1).max() <= clip * (1 + 1e-12)
        rows = moment_vectors(vectors, clip)
        assert np.isfinite(rows).all() and np.linalg.norm(rows, axis=1).max() <= 1 + 1e-12
        assert np.linalg.norm(rows, axis=1).max() > 0.99, "the bound was not put to the test"
