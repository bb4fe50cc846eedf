"""Trains the public prior: a generative model on simulated hearts with randomised appearance. Costs no privacy."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcmr.server.generation.heart_shapes import distances, draw_hearts, masks_from, slice_positions
from fedcmr.server.generation.rendering import render
from fedcmr.server.settings import Config, PretrainConfig
from fedcmr.shared.device import autocast, pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.kinds import kind_of, make
from fedcmr.shared.models.prior import FIRST_KIND, load_prior, save_prior
from fedcmr.shared.progress import track
from fedcmr.shared.style import style_moments, style_vectors
from fedcmr.shared.views import augment

STACK_SLICES = 8
SLICES_PER_HEART = 4
"""Slices kept of each simulated heart; they share one style vector, as a patient's do."""
CHECKPOINT_STEPS = 500
AUTOENCODER_SHARE = 0.25
"""Of the training, for the autoencoder of a kind that has one; the U-Net learns after it."""
NUM_SCALE_IMAGES = 512
"""Images whose latents tell how latents are standardised."""
WARM_UP_STEPS, MAX_GRAD_NORM, WEIGHT_DECAY = 200, 1.0, 0.01


@dataclass(frozen=True)
class PublicHearts:
    """The prior's training set: M = hearts x slices images.

    Attributes:
        images: Shape (M, 2, 64, 64), uint8, 0..255 for -1..1.
        masks: Shape (M, 2, 64, 64), uint8 labels.
        styles: Shape (M, K), standardised.
        style_mean: Shape (K,).
        style_std: Shape (K,).
        style_correlation: Shape (K, K).
    """

    images: Tensor
    masks: Tensor
    styles: Tensor
    style_mean: Tensor
    style_std: Tensor
    style_correlation: Tensor

    def chosen(self, index: Tensor | slice) -> Tensor:
        """Chosen images, shape (N, 2, 64, 64), float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def draw(self, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random views of `num` random images: images, masks, style vectors."""
        index = torch.randint(len(self.images), (num,), generator=rng)
        images, masks = augment(self.chosen(index), self.masks[index], rng, max_rotation_deg=60)
        return images, masks, self.styles[index]


def learning_rate(peak: float, step: int, done: float) -> float:
    """Of a step, the first being 0: a linear warm-up, and a cosine that ends at 0 with `done`, in [0, 1], at 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(limit: float, num_steps: int) -> float:
    """Of the weights' average after so many steps: short at first, so that the first steps are forgotten."""
    return min(limit, (1 + num_steps) / (10 + num_steps))


def simulate_hearts(num_hearts: int, seed: int) -> PublicHearts:
    """Draw, slice and render hearts over the whole range of ejection fractions."""
    images, masks, styles = [], [], []
    chunk = 50
    for start in track(range(0, num_hearts, chunk), "simulating hearts"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        hearts = draw_hearts(min(chunk, num_hearts - start), generator, STACK_SLICES)
        chosen = torch.rand(len(hearts), STACK_SLICES, generator=generator).argsort(1)[:, :SLICES_PER_HEART]
        d = distances(hearts, slice_positions(hearts, STACK_SLICES).gather(1, chosen.sort(1).values))
        labels, rendered = masks_from(d), render(hearts, d, generator)
        styles.append(style_vectors(rendered, labels).repeat_interleave(SLICES_PER_HEART, dim=0))
        images.append(((rendered + 1) * 127.5).round().to(torch.uint8).flatten(0, 1))
        masks.append(labels.flatten(0, 1))
    raw = torch.cat(styles)
    mean, std, correlation = style_moments(raw)
    standardised = torch.nan_to_num((raw - mean) / std, nan=0.0)
    return PublicHearts(torch.cat(images), torch.cat(masks), standardised, mean, std, correlation)


def pretrain(config: Config, out: Path, minutes: float | None = None) -> None:
    """Train the generative model and write the prior with a card next to it; resumes from `out`'s checkpoint if any.

    Args:
        config: `generator`, `pretrain`, `seed` and `device` are used.
        out: The prior's file, ending in .safetensors.
        minutes: Stop by then, with the learning rate brought to zero; None trains `pretrain.num_steps`.

    Raises:
        UserError: The folder is not writable, the checkpoint belongs to other settings, or the prior to begin with is
            of another kind.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hearts = simulate_hearts(config.pretrain.num_hearts, config.seed)
        trainer = Trainer(config, hearts, out.with_suffix(".checkpoint"))
        trainer.run(minutes)
        card = trainer.card()
        save_prior(
            out,
            trainer.ema,
            hearts.style_mean,
            hearts.style_std,
            hearts.style_correlation,
            {name: json.dumps(value) for name, value in card.items()},
        )
        out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


class Trainer:
    """Everything that must survive a restart: weights, their average, optimiser, step, seconds.

    Attributes:
        ema: The average of the weights: what becomes the prior.
        step: Optimiser steps so far.
        autoencoder_steps: How many of them trained the autoencoder; None while it is trained.
    """

    def __init__(self, config: Config, hearts: PublicHearts, checkpoint: Path):
        self.settings: PretrainConfig = config.pretrain
        self.kind = config.generator.kind
        self.seed, self.device = config.seed, pick_device(config.device)
        self.hearts, self.checkpoint = hearts, checkpoint
        torch.manual_seed(config.seed)
        start = load_prior(Path(self.settings.start)) if self.settings.start else None
        self.start_sha256 = start.sha256 if start else None
        if start and kind_of(start.generator) != self.kind:
            raise UserError(
                f"pretrain.start: {self.settings.start} is of kind {kind_of(start.generator)}, expected {self.kind} "
                "as in generator.kind"
            )
        model = start.generator if start else make(self.kind)
        self.generator: GenerativeModel = model.train().requires_grad_(True).to(self.device)
        self.ema = make(self.kind, self.generator.architecture).to(self.device)
        self.ema.load_state_dict(self.generator.state_dict())
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=1e-8, weight_decay=WEIGHT_DECAY)
        self.step, self.elapsed_s, self.loss = 0, 0.0, float("nan")
        self.share = AUTOENCODER_SHARE if self.generator.autoencoder and not start else 0.0
        self.autoencoder_steps: int | None = None if self.share else 0
        self._resume()

    def run(self, minutes: float | None) -> None:
        """Train until the steps or the minutes are used up."""
        started = time.monotonic() - self.elapsed_s
        steps = range(self.step, self.settings.num_steps)
        try:
            for step in track(steps, "training the prior"):
                done = step / self.settings.num_steps
                if minutes is not None:
                    done = max(done, self.elapsed_s / (60 * minutes))
                if done >= 1:
                    break
                self._train_step(done)
                self.elapsed_s = time.monotonic() - started
                if self.step % CHECKPOINT_STEPS == 0:
                    self._save()
        finally:  # an interruption loses nothing
            self._save()

    def card(self) -> dict[str, Any]:
        """What made the prior, for the file beside it."""
        return {
            "command": "fedcmr-server pretrain",
            "kind": self.kind,
            "seed": self.seed,
            "num_hearts": self.settings.num_hearts,
            "num_steps": self.step,
            "batch_size": self.settings.batch_size,
            "elapsed_minutes": round(self.elapsed_s / 60, 1),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "final_loss": round(self.loss, 5),
            "torch": torch.__version__,
            "start_sha256": self.start_sha256,
        }

    def _train_step(self, done: float) -> None:
        rng = torch.Generator().manual_seed(self.seed * 7_368_787 + self.step)
        images, masks, styles = self.hearts.draw(self.settings.batch_size, rng)
        images, condition = images.to(self.device), Condition(masks, styles).to(self.device)
        if self.autoencoder_steps is None and done >= self.share:
            self._finish_autoencoder()
        if self.autoencoder_steps is None:
            steps_before, done = 0, done / self.share
        else:
            steps_before, done = self.autoencoder_steps, (done - self.share) / (1 - self.share)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.learning_rate, self.step - steps_before, done)
        with autocast(self.device):
            if self.autoencoder_steps is None:
                assert self.generator.autoencoder is not None
                loss = self.generator.autoencoder.loss(images, rng).mean()
            else:
                loss = self.generator.loss(images, condition, rng).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value
        decay = ema_decay(self.settings.ema_decay, self.step - steps_before)
        with torch.no_grad():
            for mean, weight in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)

    def _finish_autoencoder(self) -> None:
        """From here on the U-Net learns the latents of the averaged autoencoder, which stays as it is."""
        trained, average = self.generator.autoencoder, self.ema.autoencoder
        assert trained is not None and average is not None
        with autocast(self.device):
            average.standardise(self.hearts.chosen(slice(NUM_SCALE_IMAGES)).to(self.device))
        trained.load_state_dict(average.state_dict())
        self.autoencoder_steps = self.step

    def _fingerprint(self) -> str:
        """What must be equal for a checkpoint to be continued; those of earlier versions name no kind."""
        s = self.settings
        values = [self.seed, s.start, s.num_hearts, s.batch_size, s.learning_rate, s.ema_decay]
        return json.dumps(values if self.kind == FIRST_KIND else [*values, self.kind])

    def _save(self) -> None:
        tensors = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        metadata = {
            "step": str(self.step),
            "elapsed_s": str(self.elapsed_s),
            "loss": str(self.loss),
            "settings": self._fingerprint(),
            "autoencoder_steps": json.dumps(self.autoencoder_steps),
        }
        partial = self.checkpoint.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
        partial.replace(self.checkpoint)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        with safe_open(self.checkpoint, framework="pt") as file:
            metadata = file.metadata()
        if metadata["settings"] != self._fingerprint():
            raise UserError(f"{self.checkpoint} was made with other settings: remove it or choose another --out")
        tensors = load_file(self.checkpoint)
        for name, module in (("generator.", self.generator), ("ema.", self.ema)):
            module.load_state_dict({k[len(name) :]: v for k, v in tensors.items() if k.startswith(name)})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.elapsed_s, self.loss = (
            int(metadata["step"]),
            float(metadata["elapsed_s"]),
            float(metadata["loss"]),
        )
        self.autoencoder_steps = json.loads(metadata.get("autoencoder_steps", "0"))
