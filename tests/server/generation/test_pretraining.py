"""Pre-training: a resumed run equals an uninterrupted one, and the file it writes is a prior."""

import dataclasses
import json

import pytest
import torch

import fedcmr.server.generation.pretraining
from fedcmr.server.generation.pretraining import pretrain
from fedcmr.server.settings import Config, PretrainConfig
from fedcmr.shared.errors import UserError
from fedcmr.shared.networks.generator import load_prior


@pytest.fixture
def config() -> Config:
    return Config(device="cpu", pretrain=PretrainConfig(num_hearts=8, num_steps=4, batch_size=2, learning_rate=1e-3))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, config, monkeypatch):
    monkeypatch.setattr(fedcmr.server.generation.pretraining, "CHECKPOINT_STEPS", 2)
    pretrain(config, tmp_path / "whole.safetensors")
    real_step = fedcmr.server.generation.pretraining._Trainer._train_step

    def stop_at_three(trainer, done):
        if trainer.step == 3:
            raise KeyboardInterrupt
        real_step(trainer, done)

    monkeypatch.setattr(fedcmr.server.generation.pretraining._Trainer, "_train_step", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "parts.safetensors")
    monkeypatch.setattr(fedcmr.server.generation.pretraining._Trainer, "_train_step", real_step)
    pretrain(config, tmp_path / "parts.safetensors")
    whole, parts = load_prior(tmp_path / "whole.safetensors"), load_prior(tmp_path / "parts.safetensors")
    for name, value in whole.generator.state_dict().items():
        assert torch.equal(value, parts.generator.state_dict()[name]), name
    card = json.loads((tmp_path / "parts.json").read_text())
    assert (card["num_steps"], card["seed"], card["start_sha256"]) == (4, 0, None)
    assert (tmp_path / "whole.safetensors").stat().st_size < 16e6

    other = dataclasses.replace(config, seed=1)
    with pytest.raises(UserError, match="other settings"):
        pretrain(other, tmp_path / "whole.safetensors")


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
