"""The training loop of every network of the server: steps until the budget is used up, with exact resumption.

Guarantees: where everything random in the loss of a step follows from the number of that step, a training that was
interrupted any number of times ends with the weights, and logs the losses, of an uninterrupted one, bit for bit on a
CPU with the same number of threads. Not covered: budgets in minutes, which end when the clock says so.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcmr.server.training.schedule import Schedule
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import show_share

LOG_EVERY = 20
SMOOTHING = 0.99
"""Decay of the average loss that `TrainingState.loss` holds."""

LossOfStep = Callable[[int], Tensor]
"""The loss of a step, to be differentiated, from the number of steps before it."""


@dataclass(frozen=True)
class Recipe:
    """How a step is taken.

    Attributes:
        learning_rate: A schedule.
        ema_decay: A schedule of the decay of the weights' average.
        max_grad_norm: The gradient is scaled down to this norm; None leaves it as it is.
    """

    learning_rate: Schedule
    ema_decay: Schedule
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class Budget:
    """When a training ends: after so many steps, or after so many minutes if that is sooner."""

    num_steps: int
    minutes: float | None = None

    def used(self, num_steps: int, elapsed_s: float) -> float:
        """The used share, from 1 on nothing is left."""
        share = num_steps / self.num_steps
        return share if self.minutes is None else max(share, elapsed_s / (60 * self.minutes))

    def describe(self, num_steps: int, elapsed_s: float) -> str:
        """What was used, in the words of the progress bar."""
        if self.minutes is None:
            return f"step {num_steps} of {self.num_steps}"
        return f"step {num_steps}, {elapsed_s / 60:.1f} of {self.minutes:g} minutes"


@dataclass(frozen=True)
class Checkpoints:
    """Where a training is kept while it lasts.

    Attributes:
        path: A safetensors file; the one before it lies next to it.
        identity: Data, settings and seed as text: only a checkpoint of the same identity is resumed.
        every: Steps between two of them.
        kept: Whether the last state is kept after the training, so that a larger budget can resume it.
        refuse_others: Whether a checkpoint of another identity is an error; else it is not used.
    """

    path: Path
    identity: str
    every: int
    kept: bool = False
    refuse_others: bool = False


def identity_of(settings: Any, seed: int, data: Iterable[Tensor]) -> str:
    """What a checkpoint must agree on to be resumed: a hash of settings (a dataclass), seed and data."""
    digest = hashlib.sha256(repr((sorted(asdict(settings).items()), seed)).encode())
    for tensor in data:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def train(
    state: TrainingState[Any],
    loss_of_step: LossOfStep,
    recipe: Recipe,
    budget: Budget,
    description: str,
    checkpoints: Checkpoints | None = None,
    log: Callable[[int, float], None] | None = None,
    remedy: str = "lower the learning rate",
) -> None:
    """Train `state.model`, and with it the average `state.ema`, until the budget is used up.

    Args:
        state: At its first step, or where an earlier call left it.
        loss_of_step: What to minimise. It is called once a step, before the step is taken.
        recipe: Learning rate, average, clipping.
        budget: Steps or minutes.
        description: What is trained, shown next to the progress bar.
        checkpoints: Where to resume from and save to; None keeps nothing.
        log: Called with (steps, mean loss since the last call) every `LOG_EVERY` steps and at the end; after a
            resumption first with what was logged before it.
        remedy: What to do where the loss is not finite, for the error message.

    Raises:
        UserError: The loss is not finite, or no checkpoint can be read, or it belongs to another training.
    """
    if checkpoints:
        state.restore(checkpoints.path, checkpoints.identity, checkpoints.refuse_others)
    if log:
        for logged in state.history:
            log(*logged)
    started = time.monotonic() - state.elapsed_s
    with show_share(description) as tell:
        while (done := budget.used(state.num_steps, state.elapsed_s)) < 1:
            tell(done, budget.describe(state.num_steps, state.elapsed_s))
            take_step(state, loss_of_step, recipe, done)
            state.elapsed_s = time.monotonic() - started
            if state.num_steps % LOG_EVERY == 0:
                _log(state, description, log, remedy)
            if checkpoints and state.num_steps % checkpoints.every == 0 and state.num_steps < budget.num_steps:
                state.save(checkpoints.path, checkpoints.identity)
    if state.recent:
        _log(state, description, log, remedy)
    if checkpoints and checkpoints.kept:
        state.save(checkpoints.path, checkpoints.identity)
    elif checkpoints:
        state.remove(checkpoints.path)


def take_step(state: TrainingState[Any], loss_of_step: LossOfStep, recipe: Recipe, done: float = 0.0) -> None:
    """One step: loss, gradient, optimiser, average of the weights; the state counts it."""
    step = state.num_steps
    loss = loss_of_step(step)
    state.step(loss, recipe.learning_rate(step, done), recipe.max_grad_norm, recipe.ema_decay(step, done))
    value = loss.item()
    state.num_steps += 1
    state.recent.append(value)
    state.loss = value if math.isnan(state.loss) else SMOOTHING * state.loss + (1 - SMOOTHING) * value


def _log(state: TrainingState[Any], description: str, log: Callable[[int, float], None] | None, remedy: str) -> None:
    """Check and report the mean loss since the last call."""
    mean = sum(state.recent) / len(state.recent)
    if not math.isfinite(mean):
        raise UserError(f"{description}: the loss is not finite at step {state.num_steps}: {remedy}")
    state.recent.clear()
    state.history.append((state.num_steps, mean))
    if log:
        log(state.num_steps, mean)
