"""Training of a segmenter: on folders of cases, or on simulated public hearts alone.

A segmenter trained on rendered public hearts only, with widely varied intensities, has seen neither a generated image
nor a patient: it is an independent evaluator. Where it measures the requested ejection fraction on a generated image,
the generator has followed the mask.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from monai.metrics import compute_dice
from torch import Tensor

from fedcmr.server.generation.public_hearts import simulate_hearts
from fedcmr.server.settings import SegmentationConfig
from fedcmr.server.tasks.segmentation.examples import Examples, prepare_examples, random_views
from fedcmr.server.training.loop import Budget, Checkpoints, Recipe, identity_of, train
from fedcmr.server.training.schedule import cosine, ema_decay
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import LV, MYO, RV, Case
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.tasks.segmentation.inference import predict_masks
from fedcmr.shared.tasks.segmentation.losses import LOSSES, SegmentationLoss
from fedcmr.shared.tasks.segmentation.segmenter import FORMAT, Architecture, Segmenter, save_segmenter, segment
from fedcmr.shared.views import Grid

NUM_HEARTS, NUM_HELD_OUT = 3000, 100
WARM_UP_STEPS, MAX_GRAD_NORM = 100, 1.0
CHECKPOINT_STEPS = 250
PUBLIC = SegmentationConfig(
    width=16, size_px=64, crop_px=64, pixel_mm=2.0, loss="moving", num_steps=3000, batch_size=32
)
"""The public segmenter's training is one and the same, whatever a study's settings are."""
HELD_OUT_OFFSET = 500
"""Added to the seed for hearts that are not in the training set."""


def measured_ef(segmenter: Segmenter, cases: Sequence[Case]) -> list[float]:
    """Ejection fraction by LV areas found on the images, summed over each stack; the cases' masks are not used.

    Returns:
        One value per case, NaN where no LV was found at ED or at ES.
    """
    return [ejection_fraction(labels.numpy()) for labels in predict_masks(segmenter, cases)]


def dice(labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Dice overlap of each structure over all pixels of all images; NaN where neither holds it.

    Args:
        labels: Predicted labels, any shape, uint8 0..3.
        masks: True labels of the same shape.
    """
    found, true = (
        torch.stack([(values == label).flatten() for label in (RV, MYO, LV)])[None].float()
        for values in (labels, masks)
    )
    overlap = compute_dice(found, true, ignore_empty=False)[0]
    empty = (found.sum(2) + true.sum(2) == 0)[0]
    return {
        name: math.nan if nothing else float(value)
        for name, value, nothing in zip(("rv", "myo", "lv"), overlap, empty, strict=True)
    }


def train_on_cases(
    cases: Sequence[Case],
    config: SegmentationConfig,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    description: str = "training the segmenter",
    log: Callable[[int, float], None] | None = None,
    start: Segmenter | None = None,
    minutes: float | None = None,
) -> Segmenter:
    """Train on all slices of the segmented cases and return the averaged (EMA) network.

    Everything random follows from (seed, step), so a resumed training equals an uninterrupted one.

    Args:
        cases: Training cases; those with incomplete masks are left out.
        config: Steps, batch, learning rate, average.
        seed: Seed of weights, order and augmentation.
        device: Where to train.
        checkpoint: Removed at the end. One that belongs to other data, settings or seed is not used.
        description: What is trained, shown next to the progress bar.
        log: As for `fedcmr.server.training.loop.train`.
        start: A trained segmenter of the same architecture, whose weights are the first ones.
        minutes: Stop by then, with the learning rate brought to zero; None trains all steps.

    Raises:
        UserError: No case is segmented, `start` has another architecture, or the loss is not finite.
    """
    examples = prepare_examples(cases, Grid(config.size_px, config.pixel_mm))
    data = (examples.images.flatten(1).sum(1, dtype=torch.float64), examples.masks.flatten(1).sum(1))
    if start is not None:
        data = (*data, *(value.flatten().double() for value in start.state_dict().values()))
    checkpoints = Checkpoints(checkpoint, identity_of(config, seed, data), CHECKPOINT_STEPS) if checkpoint else None
    budget = Budget(config.num_steps, minutes)
    state = _train(examples, config, seed, device, budget, checkpoints, description, log, start)
    segmenter = state.ema.eval()
    segmenter.elapsed_s = state.elapsed_s
    return segmenter


def train_segmenter(
    out: Path,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
    num_steps: int = PUBLIC.num_steps,
    num_hearts: int = NUM_HEARTS,
) -> None:
    """Train on simulated hearts and write the weights with a card next to them; resumes from `out`'s checkpoint.

    Args:
        out: The segmenter's file, ending in .safetensors.
        seed: Seed of hearts, weights, order and augmentation.
        device: Where to train.
        minutes: Stop by then, with the learning rate brought to zero; None trains `num_steps`.
        num_steps: Steps at most.
        num_hearts: Training hearts, four slices each.

    Raises:
        UserError: The folder is not writable.
    """
    try:
        private_folder(out.parent)
        hearts = simulate_hearts(num_hearts, seed)
        examples = Examples(hearts.images, hearts.masks)
        identity = f"{FORMAT} seed {seed}, {len(examples.images)} pictures, batch {PUBLIC.batch_size}"
        checkpoints = Checkpoints(out.with_suffix(".checkpoint"), identity, CHECKPOINT_STEPS, kept=True)
        state = _train(examples, PUBLIC, seed, device, Budget(num_steps, minutes), checkpoints)
        segmenter = state.ema.eval()
        hearts = simulate_hearts(NUM_HELD_OUT, seed + HELD_OUT_OFFSET)
        held_out = Examples(hearts.images, hearts.masks)
        overlap = dice(segment(segmenter, held_out.images_at(slice(None))), held_out.masks)
        card = {
            "command": f"fedcmr-server segmenter --out {out.name}",
            "trained_on": f"{num_hearts} simulated hearts; no patient, no generated image",
            "seed": seed,
            "num_steps": state.num_steps,
            "batch_size": PUBLIC.batch_size,
            "elapsed_minutes": round(state.elapsed_s / 60, 1),
            "device": device.type,
            "threads": torch.get_num_threads(),
            f"dice_on_{NUM_HELD_OUT}_other_simulated_hearts": {name: round(v, 4) for name, v in overlap.items()},
            "torch": torch.__version__,
        }
        save_segmenter(out, segmenter, card)
        out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


def _train(
    examples: Examples,
    config: SegmentationConfig,
    seed: int,
    device: torch.device,
    budget: Budget,
    checkpoints: Checkpoints | None,
    description: str = "training the segmenter",
    log: Callable[[int, float], None] | None = None,
    start: Segmenter | None = None,
) -> TrainingState[Segmenter]:
    """Train a new network; everything random follows from (seed, step)."""
    architecture = Architecture(config.network, config.width, config.size_px, config.pixel_mm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = Segmenter(architecture).to(device).train()
    if start is not None:
        if start.architecture != architecture:
            raise UserError(
                "the segmenter to start from has other segmentation.network, width or grid than the settings"
            )
        segmenter.load_state_dict(start.state_dict())
    state = TrainingState(segmenter, config.weight_decay)
    loss_of = SegmentationLoss(LOSSES[config.loss])

    def loss_of_step(step: int) -> Tensor:
        images, masks = random_views(examples, config, seed, step)
        # In float32 on a CPU: at these widths that is 1.3 times faster than bf16 is.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = segmenter(images.to(device))
        return loss_of(logits.flatten(0, 1), masks.to(device).flatten(0, 1), budget.used(step, state.elapsed_s))

    recipe = Recipe(
        lambda step, done: cosine(step, done, config.learning_rate, WARM_UP_STEPS),
        lambda step, _: ema_decay(config.ema_decay, step),
        MAX_GRAD_NORM,
    )
    train(state, loss_of_step, recipe, budget, description, checkpoints, log, "lower segmentation.learning_rate")
    return state
