"""The attacks catch a generator that memorised, and find nothing where nothing was learnt."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedcmr.server.report.audit import membership_lines
from fedcmr.server.settings import load
from fedcmr.shared.models.base import Condition
from fedcmr.shared.models.flow_matching import FlowMatching
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import load_prior
from fedcmr.simulations.audit import membership as attacks
from fedcmr.simulations.audit.membership import LOSS, RATIO, SIMA, attack_arrays, attack_generator, federate
from fedcmr.simulations.audit.study import Pool, draw_pool, overfitted
from fedcmr.simulations.benchmarks.adapters import fixed_views
from fedcmr.simulations.benchmarks.cost import simulated_patients

pytestmark = pytest.mark.slow

NUM = 8
SETTINGS = (
    "federation.adapter=norm_affine",
    "federation.num_rounds=2",
    "federation.local_steps=1",
    "federation.num_views=2",
)


def pool_of(prior, num: int = NUM, num_sites: int = 1) -> Pool:
    """Rendered hearts, one slice each; every other one trains."""
    slices = slice(2, 3)
    patients = [
        replace(p, images=p.images[slices], masks=p.masks[slices], vendors=p.vendors[slices])
        for p in simulated_patients(2 * num, prior, 6)
    ]
    number = np.arange(2 * num)
    return Pool(patients, number % 2 == 0, number // 2 % num_sites, ["GE"] * num_sites)


def test_an_overfitted_generator_is_caught():
    prior = load_prior()
    pool = pool_of(prior)
    generator = overfitted(prior, pool.at(0, pool.member), num_steps=45, batch_size=8, learning_rate=5e-4)
    found = attack_generator(prior, generator, pool)
    assert found[LOSS].auc >= 0.8 and found[SIMA].auc >= 0.8
    assert found[LOSS].auc_ci95[0] > 0.5 and not found[LOSS].as_dict()["contains_chance"]
    assert found[LOSS].control_holds and found[SIMA].control_holds, "members against members: nothing to find"


def test_a_score_that_follows_the_order_of_patients_is_noticed_by_the_control(prior, monkeypatch):
    """Members came before others: such a score tells them apart, and tells members from members as well."""
    pool = pool_of(prior, 20, num_sites=2)
    pool = replace(pool, member=np.arange(40) < 20)
    calls = []

    def drifting(*_):
        calls.append(None)
        return np.zeros(40) if len(calls) == 1 else np.arange(40.0)

    monkeypatch.setattr(attacks, "view_losses", drifting)
    found = attack_generator(prior, prior.generator, pool)
    assert found[LOSS].auc == 1 and found[LOSS].control_auc > 0.9 and not found[LOSS].control_holds
    assert found[SIMA].control_holds
    (line,) = membership_lines({name: result.as_dict() for name, result in found.items()})
    assert line.startswith(f"{LOSS}: it distinguishes members from members")


def test_a_study_without_privacy_is_caught_by_the_likelihood_ratio_too():
    """Eight patients of one slice in low-rank updates; SimA needs a generator whose clean images changed."""
    prior = load_prior()
    pool = pool_of(prior)
    settings = (
        "privacy.enabled=false",
        "federation.adapter=lora",
        "federation.num_rounds=6",
        "device=cpu",
        "federation.local_steps=2",
        "federation.num_views=4",
        "federation.learning_rate=4",
        "federation.ema_decay=0",
    )
    config = load("default", settings)
    found = attack_arrays(prior, federate(prior, pool, config), pool, config, num_shadows=8)
    # With eight against eight one pair is 0.016, and another processor's rounding turns one or two over.
    assert found[LOSS].auc >= 0.75 and found[RATIO].auc >= 0.75
    assert found[LOSS].auc_ci95[0] > 0.5 and found[RATIO].auc_ci95[0] > 0.5


def test_a_private_study_passes_all_three_attacks(prior, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr("fedcmr.client.training.os_generator", lambda: rng)  # the same noise every time
    pool = pool_of(prior, 20, num_sites=2)
    config = load("default", SETTINGS)
    found = attack_arrays(prior, federate(prior, pool, config), pool, config, num_shadows=4)
    assert list(found) == [LOSS, SIMA, RATIO]
    assert all(result.num_members == 20 == result.num_others for result in found.values())
    assert all(result.auc < 0.75 and result.auc_ci95[0] <= 0.5 for result in found.values())


def test_the_prior_itself_betrays_nobody(prior):
    pool = pool_of(prior, 3)
    found = attack_generator(prior, prior.generator, pool)
    assert found[LOSS].auc == 0.5 == found[SIMA].auc and found[LOSS].num_above_all_others == 0


def test_the_ratio_is_the_gain_over_shadows_without_the_patient(prior, monkeypatch):
    """A patient whose target gains what shadows without it gain has score 0, whatever the shadows with it do."""
    pool = pool_of(prior, 3)
    config = load("default", SETTINGS)
    base, extra = np.arange(6.0), 100.0
    inside = []

    def shadow(prior, gradients, chosen, *_):
        inside.append(chosen)
        return {name: p.detach().numpy().copy() for name, p in prior.generator.trainable().items()}

    before = np.zeros(6)
    monkeypatch.setattr(attacks, "_shadow", shadow)
    monkeypatch.setattr(attacks, "view_losses", lambda *_: -(base + extra * inside[-1] + (-1) ** len(inside)))
    scores = attacks.likelihood_ratio(prior, pool, config, base, before, fixed_views(pool.patients), 40)
    assert np.abs(scores).max() < 1
    grown = attacks.likelihood_ratio(prior, pool, config, base + 5, before, fixed_views(pool.patients), 40)
    assert grown.min() > 3
    assert all(chosen.sum() == 3 for chosen in inside)


def test_a_shadow_takes_the_studys_steps(prior):
    """Without noise: start - learning rate x mean over sites of the chosen patients' mean gradient."""
    pool = pool_of(prior, 4, num_sites=2)
    config = load("default", [*SETTINGS, "privacy.enabled=false", "federation.ema_decay=0"])
    start = {name: p.detach().numpy().copy() for name, p in prior.generator.trainable().items()}
    size = sum(array.size for array in start.values())
    rng = np.random.default_rng(0)
    gradients = rng.normal(0, 0.01, (attacks.NUM_DRAWS, 8, size))
    chosen = np.array([True, True, False, True, True, False, True, True])
    made = attacks._shadow(prior, gradients, chosen, pool.site, config, rng)
    means = [gradients[0, chosen & (pool.site == number)].mean(axis=0) for number in (0, 1)]
    expected = np.concatenate([array.ravel() for array in start.values()]) - 3 * np.mean(means, axis=0)
    np.testing.assert_allclose(np.concatenate([made[name].ravel() for name in start]), expected, atol=1e-6)


def test_sima_reads_the_noise_off_the_velocity():
    """A generator whose velocity is the clean image finds no noise in it; one that is silent finds all of it."""
    images = torch.rand(5, 2, 64, 64) * 2 - 1
    clean = [
        (images[:2], torch.zeros(2, 2, 64, 64).byte(), torch.zeros(2, 11)),
        (images[2:], torch.zeros(3, 2, 64, 64).byte(), torch.zeros(3, 11)),
    ]

    class Knows(FlowMatching):
        share = 1.0

        def velocity(self, x_t, t, condition):
            return self.share * x_t / t[:, None, None, None]

    knows = Knows(Architecture(channels=(16, 16), norm_num_groups=4))
    np.testing.assert_allclose(attacks.predicted_noise(knows, clean), 0, atol=1e-4)
    knows.share = 0.0
    expected = [float((attacks.SIMA_T * part).flatten(1).norm(dim=1).mean()) for part in (images[:2], images[2:])]
    np.testing.assert_allclose(attacks.predicted_noise(knows, clean), expected, rtol=1e-4)


def test_losses_are_each_patients_own(prior):
    pool = pool_of(prior, 2)
    together = attacks.view_losses(prior.generator, fixed_views(pool.patients))
    with torch.no_grad():
        alone = []
        for patient in pool.patients:
            images, masks, styles, t, noise = fixed_views([patient])
            alone.append(float(prior.generator.loss_at(images, Condition(masks, styles), t, noise).mean()))
    np.testing.assert_allclose(together, alone, rtol=2e-2)  # bf16 where the processor has it


def test_patients_of_the_simulated_hospitals(prior):
    pool = draw_pool(["GE", "Siemens"], 1, prior, seed=3)
    assert pool.member.tolist() == [True, False, True, False] and pool.site.tolist() == [0, 0, 1, 1]
    for patient in pool.patients:
        assert patient.images.shape[1:] == (2, 64, 64) and patient.images.abs().max() <= 1
        lv = [(patient.masks[:, phase] == 3).sum() for phase in range(2)]
        assert lv[0] > lv[1] > 0  # end-diastole first
    again = draw_pool(["GE", "Siemens"], 1, prior, seed=3)
    assert torch.equal(pool.patients[1].images, again.patients[1].images)
    assert not torch.equal(pool.patients[0].masks, pool.patients[1].masks)


@pytest.mark.parametrize("part", ["member", "others"])
def test_members_are_those_who_trained(prior, part):
    pool = pool_of(prior, 2)
    chosen = pool.member if part == "member" else ~pool.member
    assert [p.name for p in pool.at(0, chosen)] == (["p0", "p2"] if part == "member" else ["p1", "p3"])
