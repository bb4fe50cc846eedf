"""The audit with canary patients catches every broken build and leaves the sound one alone."""

import numpy as np
import pytest
import torch

from client.training import LocalSteps, Patient, fine_tune, patient_gradient, view_seed
from shared.config import load
from shared.networks.generator import load_prior
from shared.privacy import clip_to_norm
from simulations.audit.canaries import NUM_SLICES, attack, audit, make_canaries
from simulations.audit.sites import BUILDS, Run, mechanism, run_site, slices_of

NUM, NUM_GUESSES, NUM_REPEATS = 24, 20, 80
SETTINGS = (
    "privacy.target_epsilon=1", "privacy.moments_share=0.05", "federation.rung=low_rank", "federation.num_rounds=2",
    "federation.local_steps=1", "federation.num_views=2", "device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def canaries(tiny_prior):
    return make_canaries(NUM, load_prior(tiny_prior), "low_rank", seed=0)


@pytest.fixture
def seeded_noise(monkeypatch):
    """Noise that repeats, so that a test either always passes or never: the client's own comes from the system."""
    rng = np.random.default_rng(7)
    monkeypatch.setattr("client.training.os_generator", lambda: rng)


@pytest.mark.parametrize("build", BUILDS)
def test_a_broken_build_is_refuted_and_the_sound_one_is_not(build, prior, canaries, seeded_noise):
    rng = np.random.default_rng(1)
    found = audit(prior, canaries, load("default", SETTINGS), build, NUM_GUESSES, NUM_REPEATS, rng)
    assert 0.98 < found.claimed_epsilon <= 1 and found.delta == 1e-3 and found.num_guesses == NUM_GUESSES
    assert found.num_runs == (NUM_REPEATS if build == "ledger_reset" else 1)
    if build == "sound":
        assert found.lower_bound <= found.claimed_epsilon and found.as_dict()["claim_holds"]
    else:
        assert found.lower_bound > found.claimed_epsilon and found.p_value < 0.05


def test_the_attack_knows_what_a_canary_adds_to_an_update(prior, canaries):
    """Without noise, the update's equations hold to rounding: scores are the coins."""
    config = load("default", SETTINGS)
    inside = canaries[::2]
    runs = run_site(prior, inside, NUM // 2, config, "noise_off", 1)
    gradients = [entry for entry in runs[0].rounds if entry.request.task == "gradients"]
    scores = attack(prior, canaries, [Run(gradients, 1.0)], NUM // 2)
    np.testing.assert_allclose(scores[::2], 0.5, atol=0.05)
    np.testing.assert_allclose(scores[1::2], -0.5, atol=0.05)
    with_moments = attack(prior, canaries, runs, NUM // 2)
    assert with_moments[::2].min() > with_moments[1::2].max()


def test_canaries_are_clipped_and_unlike_each_other(prior, canaries):
    config = load("default", SETTINGS)
    start = {name: p.detach().clone() for name, p in prior.generator.trainable("low_rank").items()}
    with prior.generator.holding(start) as part:
        gradients = np.stack([patient_gradient(prior.generator, c, 2, 0, list(part.values())) for c in canaries])
    norms = np.linalg.norm(gradients, axis=1)
    assert np.median(norms) > config.privacy.max_grad_norm
    assert np.linalg.matrix_rank(gradients / norms[:, None], tol=0.02) == NUM
    assert len({canary.name for canary in canaries}) == NUM
    again = make_canaries(NUM, prior, "low_rank", seed=0)
    assert all(torch.equal(a.images, b.images) for a, b in zip(canaries, again, strict=True))


def test_what_is_broken_is_what_it_is_called(prior, canaries):
    config = load("default", SETTINGS)
    request = run_site(prior, canaries[:3], 3, config, "sound", 1)[0].rounds[1].request
    steps, device = LocalSteps.of(request), torch.device("cpu")
    start = {name: p.detach().numpy().copy() for name, p in prior.generator.trainable("low_rank").items()}

    def update(patients, build):
        how = mechanism(request, 3, build)
        parts = fine_tune(prior.generator, patients, start, how, steps, device)
        return -np.concatenate([parts[name].ravel() for name in start]) * 3 / request.learning_rate

    with prior.generator.holding({name: torch.from_numpy(array) for name, array in start.items()}) as part:
        seed = view_seed(0, 2, 0, canaries[0].name)
        gradient = patient_gradient(prior.generator, canaries[0], 2, seed, list(part.values()))
    clip, sigma = request.max_grad_norm, request.max_grad_norm * request.noise_multiplier
    np.testing.assert_allclose(update(canaries[:1], "noise_off"), clip_to_norm(gradient, clip), atol=1e-5)
    noise = update([], "sound")
    assert 0.8 * sigma < noise.std() < 1.2 * sigma
    spread = (update(canaries[:1], "clip_off") - gradient).std()
    assert 0.8 * sigma < spread < 1.2 * sigma and np.linalg.norm(gradient) > 2 * clip
    pieces = slices_of(canaries[0])
    assert len(pieces) == NUM_SLICES and len({piece.name for piece in pieces}) == NUM_SLICES
    assert np.linalg.norm(update(pieces, "noise_off")) > 4 * clip


def test_without_a_canary_in_it_a_site_still_releases(prior, canaries):
    config = load("default", SETTINGS)
    quiet = Patient("quiet", *(getattr(canaries[0], k) for k in ("images", "masks", "codes", "vendors")))
    runs = run_site(prior, [quiet], 20, config, "sound", 1)
    scores = attack(prior, canaries, runs, 20)
    assert scores.shape == (NUM,) and np.isfinite(scores).all()
