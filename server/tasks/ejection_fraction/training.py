"""Training of the ResNet50 of `fedcmr.shared.tasks.ejection_fraction.network` on slices of many patients."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcmr.server.settings import RegressionConfig
from fedcmr.server.tasks.ejection_fraction.examples import Examples, prepare_examples
from fedcmr.server.training.augmentation import augment_pairs
from fedcmr.server.training.loop import Budget, Checkpoints, Recipe, identity_of, train
from fedcmr.server.training.schedule import ema_decay, one_cycle
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import Case
from fedcmr.shared.device import autocast
from fedcmr.shared.tasks.ejection_fraction.network import Prediction, Regressor

EF_BETA = 0.1
"""Where the smooth L1 loss turns from square to linear: 10 EF points, between readers' and gross errors."""
AREA_WEIGHT, AREA_SCALE = 0.5, 5.0
"""Weight of the area terms, and what brings areas (a dilated cavity fills 0.2 of the image) to the range of EF."""
MAX_GRAD_NORM = 5.0
CHECKPOINT_EVERY = 200


def regression_loss(prediction: Prediction, ef: Tensor, areas: Tensor) -> Tensor:
    """Smooth L1 on the ejection fraction and on both areas, where they are known, averaged over the batch."""
    predicted = AREA_SCALE * torch.stack([prediction.area_ed, prediction.area_es], 1)
    return _known_l1(prediction.ef, ef) + AREA_WEIGHT * _known_l1(predicted, AREA_SCALE * areas)


def _known_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1, averaged over all elements; unknown ones (NaN) count as met."""
    return F.smooth_l1_loss(predicted, torch.where(target.isfinite(), target, predicted.detach()), beta=EF_BETA)


def train_regressor(
    cases: Sequence[Case],
    config: RegressionConfig,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    description: str = "training the ResNet50",
    log: Callable[[int, float], None] | None = None,
    network: type[Regressor] = Regressor,
) -> Regressor:
    """Train on slices of every patient and return the averaged (EMA) network, not calibrated yet.

    Everything random follows from (seed, step), so a run resumed from its checkpoint equals an uninterrupted one, and
    on a CPU with the same number of threads equal seeds give equal weights.

    Args:
        cases: Patients of any number of slices; those without an ejection fraction are left out.
        config: Steps, batch size, learning rate, weight decay, decay of the average, augmentation; above an
            `area_share` of 0 whole stacks are learnt, else the middle slices.
        seed: Seed of weights, order and augmentation.
        device: Where to train.
        checkpoint: A safetensors file written every `CHECKPOINT_EVERY` steps and removed at the end. One that belongs
            to other data, settings or seed is not used.
        description: What is trained, shown next to the progress bar.
        log: As for `fedcmr.server.training.loop.train`.
        network: What is trained; `Regressor` or a variant of it.

    Raises:
        UserError: No patient has an ejection fraction, or the loss is no longer finite.
    """
    examples = prepare_examples(cases, config.area_share > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(examples.mean_ef, config.area_share)
    model.to(device)
    state = TrainingState(model.train(), config.weight_decay)
    data = (examples.ef, examples.areas, examples.images.double().sum(dim=(1, 2, 3)))
    train(
        state,
        lambda step: step_loss(state.model, examples, config, seed, step, device),
        training_recipe(config),
        Budget(config.num_steps),
        description,
        Checkpoints(checkpoint, identity_of(config, seed, data), CHECKPOINT_EVERY) if checkpoint else None,
        log,
        "lower regression.learning_rate",
    )
    return state.ema.eval()


def training_recipe(config: RegressionConfig) -> Recipe:
    """One cycle of the learning rate, and an average over some 1 / (1 - `ema_decay`) steps."""
    return Recipe(
        lambda step, _: one_cycle(step, config.num_steps, config.learning_rate),
        lambda step, _: ema_decay(config.ema_decay, step),
        MAX_GRAD_NORM,
    )


def step_loss(
    model: Regressor,
    examples: Examples,
    config: RegressionConfig,
    seed: int,
    step: int,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The loss of a step: its batch is drawn and augmented; everything random follows from (seed, step)."""
    generator = torch.Generator().manual_seed(_step_seed(seed, step))
    index = batch_indices(len(examples.images), config.batch_size, seed, step)
    images, growth = augment_pairs(examples.images[index].to(device), config.augmentation, generator)
    areas = examples.areas[index].to(device) * growth[:, None]
    with autocast(torch.device(device)):
        prediction = model(images)
    return regression_loss(prediction, examples.ef[index].to(device), areas)


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of one step's batch: epoch after epoch in a new order, so every example is seen equally often."""
    first, last = step * batch_size, (step + 1) * batch_size
    order = [
        torch.randperm(num_examples, generator=torch.Generator().manual_seed(_step_seed(seed, -1 - epoch)))
        for epoch in range(first // num_examples, (last - 1) // num_examples + 1)
    ]
    start = first % num_examples
    return torch.cat(order)[start : start + batch_size]


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every (seed, step)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:7], "big")
