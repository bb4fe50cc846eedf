"""Pre-training: a resumed run equals an uninterrupted one, and the file it writes is a prior."""

import copy
import dataclasses
import json

import pytest
import torch

import fedcmr.server.generation.pretraining
from fedcmr.server.generation.pretraining import pretrain, train_prior
from fedcmr.server.generation.public_hearts import simulate_hearts
from fedcmr.server.settings import Config, GeneratorConfig, PretrainConfig
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.kinds import KINDS, kind_of
from fedcmr.shared.models.prior import load_prior


@pytest.fixture(params=KINDS)
def config(request) -> Config:
    settings = PretrainConfig(num_hearts=8, num_steps=4, batch_size=2, learning_rate=1e-3)
    return Config(device="cpu", generator=GeneratorConfig(request.param), pretrain=settings)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, config, monkeypatch):
    monkeypatch.setattr(fedcmr.server.generation.pretraining, "CHECKPOINT_STEPS", 2)
    pretrain(config, tmp_path / "whole.safetensors")
    real_step, steps = TrainingState.step, []

    def stop_after_three(state, *arguments):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(state)
        real_step(state, *arguments)

    monkeypatch.setattr(TrainingState, "step", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "parts.safetensors")
    monkeypatch.setattr(TrainingState, "step", real_step)
    pretrain(config, tmp_path / "parts.safetensors")
    whole, parts = load_prior(tmp_path / "whole.safetensors"), load_prior(tmp_path / "parts.safetensors")
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, parts.generator.state_dict()[name]), name
    card = json.loads((tmp_path / "parts.json").read_text())
    assert (card["num_steps"], card["seed"], card["start_sha256"]) == (4, 0, None)
    assert (tmp_path / "whole.safetensors").stat().st_size < 16e6
    assert card["kind"] == kind_of(parts.generator) == config.generator.kind

    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match="other settings"):
        pretrain(other, tmp_path / "whole.safetensors")


@pytest.mark.slow
def test_a_run_may_begin_with_an_earlier_prior(tmp_path, config):
    pretrain(config, tmp_path / "first.safetensors")
    config.pretrain.start = str(tmp_path / "first.safetensors")
    config.pretrain.num_steps = 1
    config.pretrain.learning_rate = 1e-9
    pretrain(config, tmp_path / "second.safetensors")
    first, second = (load_prior(tmp_path / f"{name}.safetensors").generator for name in ("first", "second"))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], atol=1e-3, rtol=1e-3)
    assert (
        json.loads((tmp_path / "second.json").read_text())["start_sha256"]
        == load_prior(tmp_path / "first.safetensors").sha256
    )


def test_an_earlier_prior_of_another_kind_is_refused(tmp_path, tiny_prior):
    settings = PretrainConfig(num_hearts=8, num_steps=1, batch_size=2, start=str(tiny_prior))
    config = Config(device="cpu", generator=GeneratorConfig("diffusion"), pretrain=settings)
    with pytest.raises(UserError, match="is of kind flow_matching, expected diffusion"):
        pretrain(config, tmp_path / "prior.safetensors")


def test_the_autoencoder_learns_first_and_stays_as_it_is_while_the_flow_learns(tmp_path, monkeypatch):
    settings = PretrainConfig(num_steps=8, batch_size=2, learning_rate=1e-3)
    config = Config(device="cpu", generator=GeneratorConfig("latent_flow"), pretrain=settings)
    hearts, trained = simulate_hearts(8, 0), []
    real_step = TrainingState.step

    def watched(state, *arguments):
        real_step(state, *arguments)
        network = state.model
        trained.append((type(network).__name__, copy.deepcopy(getattr(network, "autoencoder", network).state_dict())))

    monkeypatch.setattr(TrainingState, "step", watched)
    model = train_prior(config, hearts, tmp_path / "checkpoint", None).model
    assert [name for name, _ in trained] == ["Autoencoder"] * 2 + ["LatentFlow"] * 6
    for _, weights in trained[3:]:
        assert all(torch.equal(value, trained[2][1][name]) for name, value in weights.items()), "it has learnt before"
    assert not all(torch.equal(value, trained[0][1][name]) for name, value in trained[1][1].items())
    latents = model.encode(hearts.chosen(slice(None)))
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(8), atol=0.05, rtol=0)
