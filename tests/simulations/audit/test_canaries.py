"""The audit with canary patients refutes every broken build at the epsilon that ships, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.client.training import Execution, LocalSteps, fine_tune, patient_gradient, view_seed
from fedcmr.server.settings import load
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.privacy import clip_to_norm
from fedcmr.simulations.audit import canaries as canary_audit
from fedcmr.simulations.audit.canaries import NUM_SLICES, PER_SITE, attack, audit, make_canaries
from fedcmr.simulations.audit.sites import BUILDS, Run, mechanism, run_study, slices_of

pytestmark = pytest.mark.slow

NUM = 400
SHORT = (
    "federation.adapter=lora",
    "federation.num_rounds=2",
    "federation.local_steps=1",
    "federation.num_views=1",
    "device=cpu",
)
STATISTICS_ONLY = (*SHORT, "federation.adapter=statistics")


@pytest.fixture(scope="module")
def canaries(tiny_prior):
    return make_canaries(load_prior(tiny_prior), "lora", seed=0)


@pytest.fixture
def seeded_noise(monkeypatch):
    """Noise that repeats, so that a test either always passes or never: the client's own comes from the system."""
    rng = np.random.default_rng(7)
    monkeypatch.setattr("fedcmr.client.training.os_generator", lambda: rng)


@pytest.mark.parametrize("build", BUILDS)
def test_a_broken_build_is_refuted_at_the_epsilon_that_ships_and_the_sound_one_is_not(
    build, prior, canaries, seeded_noise
):
    """The default study's target. A ledger that forgets shows in the statistics of style alone, which cost no time."""
    settings = STATISTICS_ONLY if build == "ledger_reset" else SHORT
    found = audit(prior, canaries, NUM, load("default", settings), build, NUM, 24, rng=np.random.default_rng(1))
    assert 7.9 < found.claimed_epsilon <= 8 and found.delta == 1e-3 and found.family == "gaussian"
    assert (found.num_guesses, found.num_canaries, found.num_sites) == (NUM, NUM, NUM // PER_SITE)
    assert found.num_runs == (24 if build == "ledger_reset" else 1)
    if build == "sound":
        assert 1 < found.lower_bound <= found.claimed_epsilon and found.verdict == "not refuted"
    else:
        assert found.lower_bound > found.claimed_epsilon and found.p_value < 0.05 and found.verdict == "refuted"


def test_members_against_members_find_nothing(prior, canaries, seeded_noise):
    rng = np.random.default_rng(1)
    found = audit(prior, canaries, 100, load("default", STATISTICS_ONLY), "sound", 100, control=True, rng=rng)
    assert found.verdict == "finds nothing" and found.p_chance > 0.01 and found.lower_bound < 0.5
    real = audit(prior, canaries, 100, load("default", STATISTICS_ONLY), "sound", 100, rng=np.random.default_rng(1))
    assert real.p_chance < 1e-9, "the same patients are found where the coins mean something"


def test_a_control_that_leaks_is_noticed(prior, canaries, seeded_noise, monkeypatch):
    """Who saw the coins before guessing finds them in a study that did not use them."""
    rng = np.random.default_rng(1)
    coins = np.random.default_rng(1).random(100) < 0.5
    honest = canary_audit.attack
    monkeypatch.setattr(canary_audit, "attack", lambda *args: honest(*args) + (coins - 0.5).reshape(-1, PER_SITE))
    found = audit(prior, canaries, 100, load("default", STATISTICS_ONLY), "sound", 100, control=True, rng=rng)
    assert found.verdict == "finds what is not there" and found.p_chance < canary_audit.FALSE_ALARM


def test_the_attack_knows_what_a_canary_adds_to_an_update(prior, canaries):
    """Without noise, the update's equations hold to rounding: scores are the coins."""
    config = load("default", SHORT)
    sites = {"a": canaries[::2], "b": canaries[1::2], "c": canaries[:3]}
    runs = run_study(prior, sites, PER_SITE, config, "noise_off", 1)
    coins = np.array([[canary in there for canary in canaries] for there in sites.values()])
    gradients = [entry for entry in runs[0].rounds if entry.request.task == "gradients"]
    scores = attack(prior, canaries, [Run(gradients, 1.0)], PER_SITE)
    np.testing.assert_allclose(scores, coins - 0.5, atol=0.05)
    with_statistics = attack(prior, canaries, runs, PER_SITE)
    np.testing.assert_allclose(with_statistics, coins - 0.5, atol=0.1)


def test_runs_of_one_study_are_attacked_as_their_sum(prior, canaries, seeded_noise):
    """Four runs with the same start say as much as one with half the noise: twice the signal, and no more patients."""
    config = load("default", STATISTICS_ONLY)
    sites = {f"{number}": canaries[number % 2 :: 2] for number in range(20)}
    runs = run_study(prior, sites, PER_SITE, config, "ledger_reset", 4)
    assert len(runs) == 4 and len({run.rounds[0].replies["0"]["style_mean"].tobytes() for run in runs}) == 4
    coins = np.array([[canary in there for canary in canaries] for there in sites.values()])
    right = [int(((attack(prior, canaries, part, PER_SITE) > 0) == coins).sum()) for part in (runs[:1], runs)]
    assert right[0] < 180 < right[1]


def test_canaries_are_clipped_and_unlike_each_other(prior, canaries):
    config = load("default", SHORT)
    start = {name: p.detach().clone() for name, p in prior.generator.trainable("lora").items()}
    with prior.generator.holding(start) as part:
        gradients = np.stack([patient_gradient(prior.generator, c, 1, 0, list(part.values())) for c in canaries])
    norms = np.linalg.norm(gradients, axis=1)
    assert norms.min() > 2 * config.privacy.max_grad_norm
    assert np.linalg.cond(gradients / norms[:, None]) < 10
    styles = np.concatenate([canary.styles for canary in canaries])
    assert np.linalg.cond(styles) == 1 and np.linalg.norm(styles, axis=1).min() > config.privacy.statistics_clip
    assert len({canary.name for canary in canaries}) == PER_SITE
    again = make_canaries(prior, "lora", seed=0)
    assert all(torch.equal(a.images, b.images) for a, b in zip(canaries, again, strict=True))
    with pytest.raises(ValueError, match=r"num in 1\.\.11"):
        make_canaries(prior, "lora", seed=0, num=12)


def test_what_is_broken_is_what_it_is_called(prior, canaries):
    config = load("default", SHORT)
    request = run_study(prior, {"a": canaries[:3]}, 3, config, "sound", 1)[0].rounds[1].request
    steps, execution = LocalSteps.of(request), Execution(torch.device("cpu"))
    start = {name: p.detach().numpy().copy() for name, p in prior.generator.trainable("lora").items()}

    def update(patients, build):
        how = mechanism(request, 3, build)
        parts = fine_tune(prior.generator, patients, start, how, steps, execution)
        return -np.concatenate([parts[name].ravel() for name in start]) * 3 / request.learning_rate

    with prior.generator.holding({name: torch.from_numpy(array) for name, array in start.items()}) as part:
        seed = view_seed(0, 2, 0, canaries[0].name)
        gradient = patient_gradient(prior.generator, canaries[0], 1, seed, list(part.values()))
    clip, sigma = request.max_grad_norm, request.max_grad_norm * request.noise_multiplier
    np.testing.assert_allclose(update(canaries[:1], "noise_off"), clip_to_norm(gradient, clip), atol=1e-5)
    noise = update([], "sound")
    assert 0.8 * sigma < noise.std() < 1.2 * sigma
    spread = (update(canaries[:1], "clip_off") - gradient).std()
    assert 0.8 * sigma < spread < 1.2 * sigma and np.linalg.norm(gradient) > 2 * clip
    pieces = slices_of(canaries[0])
    assert len(pieces) == NUM_SLICES and all(len(piece.images) == len(piece.vendors) == 1 for piece in pieces)
    assert np.linalg.norm(update(pieces, "noise_off")) == pytest.approx(NUM_SLICES * clip, rel=1e-3)


def test_a_study_that_samples_its_patients_is_held_to_epsilon_and_delta_alone(prior, canaries, seeded_noise):
    config = load("default", [*SHORT, "privacy.sample_rate=0.5"])
    found = audit(prior, canaries, 20, config, "sound", 20, rng=np.random.default_rng(0))
    assert found.family == "approximate" and found.verdict == "not refuted"


def test_the_last_site_may_have_fewer_canaries_and_a_site_none(prior, canaries):
    config = load("default", STATISTICS_ONLY)
    found = audit(prior, canaries, 13, config, "sound", 5)
    assert (found.num_sites, found.num_canaries, found.num_guesses) == (2, 13, 5)
    runs = run_study(prior, {"empty": [], "other": [replace(canaries[0], name="quiet")]}, PER_SITE, config, "sound", 1)
    scores = attack(prior, canaries, runs, PER_SITE)
    assert scores.shape == (2, PER_SITE) and np.isfinite(scores).all()
