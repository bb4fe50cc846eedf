"""The training loop: against the same steps written out, and interrupted at any step."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcmr.server.training import loop
from fedcmr.server.training.loop import LOG_EVERY, Budget, Checkpoints, Recipe, train
from fedcmr.server.training.state import TrainingState
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError

NUM_STEPS = 2 * LOG_EVERY + 3
RECIPE = Recipe(
    lambda step, done: 0.1 * (1 - done) / (1 + step), lambda step, done: 0.5 + 0.4 * done, max_grad_norm=0.1
)


def network() -> nn.Module:
    """With batch statistics, and laid out as the large ones are."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))
    return layers.to(memory_format=torch.channels_last).train()


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean()


class InterruptionError(Exception):
    pass


def run(
    path=None, stop_before=None, num_steps=NUM_STEPS, minutes=None, identity="this", log=None, **kept
) -> TrainingState:
    state = TrainingState(network(), 0.01)

    def loss_of_step(step: int) -> Tensor:
        if step == stop_before:
            raise InterruptionError
        return loss_of(state.model, step)

    checkpoints = Checkpoints(path, identity, every=6, **kept) if path else None
    train(state, loss_of_step, RECIPE, Budget(num_steps, minutes), "training", checkpoints, log)
    return state


def assert_equal(first: TrainingState, second: TrainingState) -> None:
    for a, b in ((first.model, second.model), (first.ema, second.ema)):
        for name, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[name]), name
    assert (first.num_steps, first.loss, first.history) == (second.num_steps, second.loss, second.history)


def shares(monkeypatch, **budget) -> list[tuple[float, str]]:
    told: list[tuple[float, str]] = []

    @contextmanager
    def note(description):
        yield lambda share, text: told.append((share, text))

    monkeypatch.setattr(loop, "show_share", note)
    run(**budget)
    return told


def test_progress_is_the_share_of_the_budget_also_by_the_clock(monkeypatch):
    """A training by the clock once counted its steps out of all that a longer one would take, and stayed at 0 %."""
    assert shares(monkeypatch, num_steps=4) == [(k / 4, f"step {k} of 4") for k in range(4)]
    clock = iter(range(1_000_000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 6.0 * next(clock)))
    told = shares(monkeypatch, num_steps=1_000_000, minutes=0.5)
    assert [round(share, 2) for share, _ in told] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert told[2][1] == "step 2, 0.2 of 0.5 minutes"


def test_it_takes_the_steps_that_are_written_out_here():
    model, average = network(), network()
    average.load_state_dict(model.state_dict())
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    losses = []
    for step in range(7):
        done = step / 7
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - done) / (1 + step)
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if value.is_floating_point():
                    mean.lerp_(value, 1 - (0.5 + 0.4 * done))
        losses.append(loss.item())
    state = run(num_steps=7)
    for name, value in model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value), name
        if value.is_floating_point():
            assert torch.equal(state.ema.state_dict()[name], average.state_dict()[name]), name
    assert state.history == [(7, sum(losses) / 7)]


@pytest.mark.parametrize("stops", [(0,), (5,), (7, 6), (13, 25, 25, 42)])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, stops):
    path, whole, lines = tmp_path / "state.safetensors", run(), []
    for step in stops:
        with pytest.raises(InterruptionError):
            run(path, stop_before=step)
    resumed = run(path, log=lambda *line: lines.append(line))
    assert_equal(whole, resumed)
    assert lines == whole.history and [step for step, _ in lines] == [20, 40, 43]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(InterruptionError):
        run(path, stop_before=20)
    path.write_bytes(path.read_bytes()[:100])
    state = TrainingState(network(), 0.01)
    assert state.restore(path, "this") and state.num_steps == 12
    assert_equal(run(), run(path))
    with pytest.raises(InterruptionError):
        run(path, stop_before=20)
    for file in list(tmp_path.iterdir()):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"state\.safetensors and the checkpoint before it cannot be read: remove them"):
        run(path)


def test_a_power_cut_between_two_checkpoints_leaves_one(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save = checkpoint.save

    def cut(file, arrays, metadata):
        if metadata["step"] == 12:
            raise InterruptionError
        save(file, arrays, metadata)

    monkeypatch.setattr(checkpoint, "save", cut)
    with pytest.raises(InterruptionError):
        run(path)
    state = TrainingState(network(), 0.01)
    assert state.restore(path, "this") and state.num_steps == 6


def test_checkpoints_of_another_training_are_refused_or_not_used(tmp_path):
    path = tmp_path / "state.safetensors"
    run(path, identity="another", kept=True)
    assert_equal(run(), run(path))
    run(path, identity="another", kept=True)
    with pytest.raises(UserError, match="other settings: remove it"):
        run(path, refuse_others=True)


def test_what_is_kept_resumes_with_a_larger_budget(tmp_path):
    path = tmp_path / "state.safetensors"
    short = run(path, num_steps=6, kept=True)
    assert path.is_file() and short.num_steps == 6
    assert run(path, num_steps=9, kept=True).num_steps == 9


def test_a_budget_in_minutes_counts_those_before_an_interruption(tmp_path):
    path = tmp_path / "state.safetensors"
    first = run(path, minutes=1e-9, kept=True)
    assert first.num_steps == 1 and first.elapsed_s > 0 and len(first.history) == 1
    assert run(path, minutes=1e-9, kept=True).num_steps == 1
    assert Budget(10, minutes=2).used(3, 90) == 0.75 and Budget(10, minutes=2).used(9, 90) == 0.9


def test_checkpoints_of_the_version_before_resume(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(InterruptionError):
        run(path, stop_before=6)
    arrays, metadata = checkpoint.load(path)
    old = {**arrays, "model.trained_s": np.array(60, np.float32)}
    checkpoint.save(path, old, {"identity": metadata["identity"], "step": metadata["step"]})
    state = TrainingState(network(), 0.01)
    assert state.restore(path, "this") and (state.num_steps, state.elapsed_s, state.history) == (6, 60.0, [])


def test_a_loss_that_is_no_number_ends_the_training_with_the_remedy():
    state = TrainingState(network(), 0.01)
    with pytest.raises(UserError, match=f"heating: the loss is not finite at step {LOG_EVERY}: turn it down"):
        train(
            state,
            lambda step: loss_of(state.model, step) * math.nan,
            RECIPE,
            Budget(99),
            "heating",
            remedy="turn it down",
        )
