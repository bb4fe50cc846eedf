"""An independent judge of generated pictures: a small U-Net that finds the ventricles and measures what they eject.

It is trained on rendered public hearts only, with intensities far apart, and has seen neither a generated picture nor a
patient: where it finds on a picture the ejection fraction that was asked for, the generator has obeyed the mask.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from torch import Tensor

from fedcmr.server.generation.pretraining import PublicHearts, simulate_hearts
from fedcmr.server.settings import AugmentationConfig
from fedcmr.server.training.augmentation import augment_pairs
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import LV, MYO, RV, Case
from fedcmr.shared.device import autocast
from fedcmr.shared.ejection_fraction import ejection_fraction
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.progress import track
from fedcmr.shared.tasks.segmentation.network import FORMAT, Segmenter, save_segmenter, segment
from fedcmr.shared.views import augment, slice_pairs

NUM_HEARTS, NUM_HELD_OUT, NUM_STEPS, BATCH_SIZE = 3000, 100, 3000, 32
PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY, EMA_DECAY, MAX_GRAD_NORM = 3e-3, 100, 0.01, 0.998, 1.0
CHECKPOINT_STEPS = 250
INTENSITIES = AugmentationConfig(
    rotation_deg=0,
    log_scale=0,
    shift_px=0,
    flip=False,
    log_gamma=0.3,
    contrast=0.15,
    brightness=0.06,
    blur_px=0.7,
    noise=0.04,
    log_bias=0.1,
)
"""Contrast, shading, sharpness and noise only: the masks must move with the pictures, which `_training_pairs` does."""
HELD_OUT_OFFSET = 500
"""Added to the seed for hearts that the training never meets."""


def measured_ef(segmenter: Segmenter, cases: Sequence[Case]) -> list[float]:
    """Ejection fraction by LV areas found on the pictures, summed over each stack; the cases' masks are not used.

    Returns:
        One value per case, NaN where no LV was found at ED.
    """
    if not cases:
        return []
    stacks = [slice_pairs(case)[0] for case in cases]
    labels = segment(segmenter, torch.cat(stacks))
    parts = labels.split([len(stack) for stack in stacks])
    return [ejection_fraction(part.transpose(0, 1).numpy()) for part in parts]


def dice(labels: Tensor, masks: Tensor) -> dict[str, float]:
    """Dice overlap of each structure over all pixels of all pictures; NaN where neither holds it.

    Args:
        labels: Found, any shape, uint8 labels 0..3.
        masks: True, of the same shape.
    """
    scores = {}
    for name, label in (("rv", RV), ("myo", MYO), ("lv", LV)):
        found, true = labels == label, masks == label
        total = int(found.sum() + true.sum())
        scores[name] = 2 * int((found & true).sum()) / total if total else math.nan
    return scores


def train_segmenter(
    out: Path,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
    num_steps: int = NUM_STEPS,
    num_hearts: int = NUM_HEARTS,
) -> None:
    """Train on simulated hearts and write the weights with a card beside them; goes on from `out`'s checkpoint.

    Args:
        out: The segmenter's file, ending in .safetensors.
        seed: Of hearts, weights, order and augmentation.
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
        state, step = _train(hearts, out.with_suffix(".checkpoint"), seed, device, minutes, num_steps)
        segmenter = state.ema.eval()
        held_out = simulate_hearts(NUM_HELD_OUT, seed + HELD_OUT_OFFSET)
        overlap = dice(segment(segmenter, held_out.chosen(slice(None))), held_out.masks)
        card = {
            "command": f"fedcmr-server segmenter --out {out.name}",
            "trained_on": f"{num_hearts} simulated hearts; no patient, no generated picture",
            "seed": seed,
            "num_steps": step,
            "batch_size": BATCH_SIZE,
            "elapsed_minutes": round(float(state.model.trained_s) / 60, 1),
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
    hearts: PublicHearts, checkpoint: Path, seed: int, device: torch.device, minutes: float | None, num_steps: int
) -> tuple[TrainingState[Segmenter], int]:
    """The training loop; everything random follows from (seed, step). Returns the state and the steps done."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        segmenter = Segmenter().to(device).train()
    state = TrainingState(segmenter, WEIGHT_DECAY)
    identity = f"{FORMAT} seed {seed}, {len(hearts.images)} pictures, batch {BATCH_SIZE}"
    step = state.restore(checkpoint, identity)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    before_s = float(segmenter.trained_s)
    started = time.monotonic()
    for _ in track(range(step, num_steps), "training the segmenter"):
        done = step / num_steps
        if minutes is not None:
            done = max(done, float(segmenter.trained_s) / (60 * minutes))
        if done >= 1:
            break
        images, masks = _training_pairs(hearts, seed, step)
        with autocast(device):
            logits = segmenter(images.to(device))
        loss = loss_of(logits.flatten(0, 1), masks.to(device).flatten(0, 1)[:, None])
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))
        state.step(loss, rate, MAX_GRAD_NORM, min(EMA_DECAY, (1 + step) / (10 + step)))
        step += 1
        segmenter.trained_s.fill_(before_s + time.monotonic() - started)
        if step % CHECKPOINT_STEPS == 0:
            state.save(checkpoint, identity, step)
    state.save(checkpoint, identity, step)
    return state, step


def _training_pairs(hearts: PublicHearts, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """One step's batch: turned, mirrored, zoomed and shifted with its masks, then given other intensities."""
    rng = torch.Generator().manual_seed(seed * 7_368_787 + step)
    index = torch.randint(len(hearts.images), (BATCH_SIZE,), generator=rng)
    images, masks = augment(
        hearts.chosen(index),
        hearts.masks[index],
        rng,
        max_rotation_deg=45,
        max_scale=0.2,
        max_shift_px=5,
    )
    mirrored = torch.rand(len(index), 1, 1, 1, generator=rng) < 0.5
    images, masks = (torch.where(mirrored, values.flip(3), values) for values in (images, masks))
    return augment_pairs(images, INTENSITIES, rng)[0], masks
