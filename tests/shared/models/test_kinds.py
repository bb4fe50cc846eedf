"""What holds for every kind of generative model, and what a kind alone promises."""

import math

import pytest
import torch

from fedcmr.client.training import Execution, LocalSteps, fine_tune
from fedcmr.server.generation.synthesis import SharedGenerator, load_shared_generator, synthesize
from fedcmr.server.settings import SynthesisConfig, load
from fedcmr.shared.models.base import Condition, Sampler
from fedcmr.shared.models.diffusion import Diffusion
from fedcmr.shared.models.kinds import KINDS, kind_of, make
from fedcmr.shared.models.networks.autoencoder import Autoencoder
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.path import integrate, interpolate
from fedcmr.shared.models.prior import Prior, load_prior, save_prior
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.style import STYLE_NAMES
from fedcmr.simulations.audit.membership import predicted_noise, view_losses
from fedcmr.simulations.benchmarks.adapters import Site, federate, fixed_views
from fedcmr.simulations.benchmarks.cost import simulated_patients

K = len(STYLE_NAMES)
CPU = torch.device("cpu")
SMALL = Architecture(channels=(16, 16, 16), norm_num_groups=4)


def images(num: int) -> torch.Tensor:
    return torch.rand((num, 2, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1


def condition(num: int) -> Condition:
    rng = torch.Generator().manual_seed(1)
    masks = torch.randint(0, 4, (num, 2, 64, 64), generator=rng).to(torch.uint8)
    return Condition(masks, torch.randn(num, K, generator=rng))


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=KINDS)
def prior_of(request, tmp_path_factory) -> Prior:
    """A small random prior of every kind, written and read."""
    torch.manual_seed(0)
    model = make(request.param, SMALL)
    for parameter in model.unet.parameters():
        if parameter.dim() > 1 and not parameter.any():  # layers that MONAI starts at zero pass no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("kinds") / f"{request.param}.safetensors"
    save_prior(path, model, torch.zeros(K), torch.full((K,), 0.5), torch.eye(K), {"made_by": "a test"})
    prior = load_prior(path)
    assert kind_of(prior.generator) == request.param and dict(prior.made_by) == {"made_by": "a test"}
    for name, value in prior.generator.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=2e-3, rtol=2e-3)
    return prior


def test_the_loss_is_one_value_per_image_and_follows_from_its_draws(prior_of):
    model = prior_of.generator
    losses = model.loss(images(3), condition(3), seeded())
    assert losses.shape == (3,) and losses.dtype == torch.float32 and (losses > 0).all()
    assert torch.equal(losses, model.loss(images(3), condition(3), seeded()))
    assert not torch.equal(losses, model.loss(images(3), condition(3), seeded(3)))
    other = images(3)
    other[2] *= -1
    changed = model.loss(other, condition(3), seeded()) != losses
    assert changed.tolist() == [False, False, True], "an image's loss is its own"


def test_times_are_drawn_before_noise(prior_of):
    rng = seeded()
    t, noise = torch.rand(3, generator=rng), torch.randn((3, 2, 64, 64), generator=rng)
    expected = prior_of.generator.loss_at(images(3), condition(3), t, noise)
    assert torch.equal(prior_of.generator.loss(images(3), condition(3), seeded()), expected)


def test_samples_are_images_and_follow_from_their_noise(prior_of):
    model, requested = prior_of.generator, condition(4)
    made = model.sample(requested, Sampler(2), seeded())
    assert made.shape == (4, 2, 64, 64) and made.isfinite().all() and made.abs().max() <= 1
    assert torch.equal(made, model.sample(requested, Sampler(2), seeded()))
    assert not torch.equal(made, model.sample(requested, Sampler(2), seeded(3)))
    rng = seeded()
    parts = [model.sample(requested[part], Sampler(2), rng) for part in (slice(0, 3), slice(3, 4))]
    torch.testing.assert_close(torch.cat(parts), made, atol=1e-3, rtol=0)  # noise drawn in parts is that drawn at once


def test_the_guide_counts_from_a_later_start_only(prior_of):
    model = prior_of.generator

    def made(guide: float, t_start: float) -> torch.Tensor:
        rough = torch.full((2, 2, 64, 64), guide)
        return model.sample(condition(2), Sampler(1, t_start), seeded(), rough)

    rough = torch.full((2, 2, 64, 64), 0.9)
    assert (made(0.9, 0.9999) - model.decode(model.encode(rough))).abs().mean() < 0.05
    if model.t_min == 0:
        assert torch.equal(made(0.9, 0.0), made(-0.9, 0.0))
        assert torch.equal(made(0.9, 0.0), model.sample(condition(2), Sampler(1), seeded()))


def test_adapters_are_the_same_parameters_whatever_the_kind(prior_of, prior):
    names = {adapter: list(part) for adapter, part in prior_of.generator.adapters().items()}
    assert names == {adapter: list(part) for adapter, part in prior.generator.adapters().items()}


def test_a_site_trains_and_the_server_generates_with_any_kind(prior_of):
    patients = simulated_patients(2, prior_of, 3)
    steps = LocalSteps(learning_rate=0.5, num_views=2, seed=7, server_round=2)
    parts = [part for adapter, part in prior_of.generator.adapters().items() if adapter != "statistics"]
    for part in parts:
        start = {name: value.detach().numpy().copy() for name, value in part.items()}
        for noise, private in ((0.0, False), (1e-6, True)):
            how = Mechanism(noise, 1.0, 1, 0.05, 1e-3, private=private, nominal_patients=2)
            update = fine_tune(prior_of.generator, patients, start, how, steps, Execution(CPU))
            assert all(value.any() for value in update.values())
        added = {name: torch.from_numpy(start[name] + 10 * update[name]) for name in start}
        shared = SharedGenerator(added, {"GE": prior_of.styles})
        config = SynthesisConfig(num_cases=2, num_slices=2, num_steps=2)
        for which in (shared, None):
            made = synthesize(prior_of, which, config, ["GE"], 0, "cpu")
            assert [case.frames.shape for case in made.cases] == [(2, 2, 64, 64)] * 2


def test_what_a_round_publishes_is_read_and_generates_with_any_kind(prior_of, tmp_path):
    settings = [
        "federation.num_rounds=2",
        "federation.local_steps=1",
        "federation.num_views=1",
        "privacy.enabled=false",
    ]
    config = load("default", [*settings, "federation.adapter=lora"])
    state = federate(prior_of, [Site("GE", simulated_patients(2, prior_of, 2))], config, CPU)
    state.publish(tmp_path / "generator.safetensors", {"0": ["GE"]}, 1e-3)
    shared = load_shared_generator(tmp_path / "generator.safetensors", prior_of)
    assert all(value.any() for value in shared.trainable.values()), "B is zero before a round"
    made = synthesize(prior_of, shared, SynthesisConfig(num_cases=2, num_slices=1, num_steps=1), ["GE"], 0, "cpu")
    assert len(made.cases) == 2


def test_the_audit_queries_any_kind(prior_of):
    patients = simulated_patients(2, prior_of, 2)
    losses = view_losses(prior_of.generator, fixed_views(patients))
    noise = predicted_noise(prior_of.generator, [(p.images, p.masks, p.slice_styles) for p in patients])
    assert losses.shape == noise.shape == (2,) and (losses > 0).all() and (noise > 0).all()


def test_a_condition_and_a_sampler_say_what_they_expect():
    parts = condition(3)[1:]
    assert len(parts) == 2 and torch.equal(parts.style, condition(3).style[1:])
    for wrong in ({"num_steps": 0}, {"num_steps": 1, "t_start": 1.0}):
        with pytest.raises(ValueError, match="Expected"):
            Sampler(**wrong)


class KnowsTheNoise(Diffusion):
    """Predicts the noise that was added, whatever it is shown."""

    def __init__(self, noise: torch.Tensor):
        super().__init__(SMALL)
        self.noise, self.seen = noise, []

    def _noise(self, x_t, t, condition):
        self.seen.append(t)
        return self.noise


def test_known_noise_leads_to_the_image_by_any_number_of_steps():
    image, noise = images(3), torch.randn((3, 2, 64, 64), generator=seeded())
    model, t = KnowsTheNoise(noise), torch.tensor([0.02, 0.5, 0.9])
    velocity = model.velocity(interpolate(noise, image, t), t, condition(3))
    torch.testing.assert_close(velocity, image - noise, atol=1e-3, rtol=0)
    start = interpolate(noise, image, torch.full((3,), 0.3))
    for num_steps in (1, 4):
        made = integrate(lambda x_t, t: model.velocity(x_t, t, condition(3)), start, 0.3, num_steps)
        torch.testing.assert_close(made, image, atol=1e-4, rtol=0)


def test_noise_is_learnt_on_the_cosine_schedule():
    noise = torch.randn((3, 2, 64, 64), generator=seeded())
    model, draw = KnowsTheNoise(noise), torch.tensor([0.0, 0.25, 0.9])
    assert model.loss_at(images(3), condition(3), draw, noise).tolist() == [0, 0, 0]
    t = model.seen[0].double()
    ratio = torch.tan((1 - draw.double()) * math.pi / 2)  # noise to image, Nichol and Dhariwal's sin to cos
    torch.testing.assert_close((1 - t[1:]) / t[1:], ratio[1:], atol=0, rtol=1e-5)
    assert abs(t[0]) < 1e-6


def test_latents_are_standardised_and_take_the_shape_of_images_again():
    autoencoder = Autoencoder().requires_grad_(False)
    autoencoder.standardise(images(6))
    latents = autoencoder.encode(images(6))
    assert latents.shape == (6, 8, 16, 16)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-2, rtol=0)
    assert autoencoder.decode(latents).shape == (6, 2, 64, 64)
    assert autoencoder.loss(images(6), seeded()).shape == (6,)
