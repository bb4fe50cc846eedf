"""Trains the public prior: the generator on simulated hearts with randomised appearance. Costs no privacy."""

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
from fedcmr.shared.diffusion import flow_matching_loss
from fedcmr.shared.errors import UserError
from fedcmr.shared.networks.generator import Generator, load_prior, save_prior
from fedcmr.shared.progress import track
from fedcmr.shared.style import style_moments, style_vectors
from fedcmr.shared.views import augment

STACK_SLICES = 8
SLICES_PER_HEART = 4
"""Slices kept of each simulated heart; they share one appearance code, as a patient's do."""
CHECKPOINT_STEPS = 500
WARM_UP_STEPS, MAX_GRAD_NORM, WEIGHT_DECAY = 200, 1.0, 0.01


@dataclass(frozen=True)
class PublicHearts:
    """The prior's training set: M = hearts x slices pictures.

    Attributes:
        images: Shape (M, 2, 64, 64), uint8, 0..255 for -1..1.
        masks: Shape (M, 2, 64, 64), uint8 labels.
        codes: Shape (M, K), standardised.
        code_mean: Shape (K,).
        code_std: Shape (K,).
        code_correlation: Shape (K, K).
    """

    images: Tensor
    masks: Tensor
    codes: Tensor
    code_mean: Tensor
    code_std: Tensor
    code_correlation: Tensor

    def pictures(self, index: Tensor | slice) -> Tensor:
        """Chosen pictures, shape (N, 2, 64, 64), float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def draw(self, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random views of `num` random pictures: pictures, masks, codes."""
        index = torch.randint(len(self.images), (num,), generator=rng)
        pictures, masks = augment(self.pictures(index), self.masks[index], rng, max_rotation_deg=60)
        return pictures, masks, self.codes[index]


def learning_rate(peak: float, step: int, done: float) -> float:
    """Of a step, the first being 0: a linear warm-up, and a cosine that ends at 0 with `done`, in [0, 1], at 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(limit: float, num_steps: int) -> float:
    """Of the weights' average after so many steps: short at first, so that the first steps are forgotten."""
    return min(limit, (1 + num_steps) / (10 + num_steps))


def simulate_hearts(num_hearts: int, seed: int) -> PublicHearts:
    """Draw, slice and paint hearts over the whole range of ejection fractions."""
    images, masks, codes = [], [], []
    chunk = 50
    for start in track(range(0, num_hearts, chunk), "simulating hearts"):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        hearts = draw_hearts(min(chunk, num_hearts - start), generator, STACK_SLICES)
        chosen = torch.rand(len(hearts), STACK_SLICES, generator=generator).argsort(1)[:, :SLICES_PER_HEART]
        d = distances(hearts, slice_positions(hearts, STACK_SLICES).gather(1, chosen.sort(1).values))
        labels, pictures = masks_from(d), render(hearts, d, generator)
        codes.append(style_vectors(pictures, labels).repeat_interleave(SLICES_PER_HEART, dim=0))
        images.append(((pictures + 1) * 127.5).round().to(torch.uint8).flatten(0, 1))
        masks.append(labels.flatten(0, 1))
    raw = torch.cat(codes)
    mean, std, correlation = style_moments(raw)
    standardised = torch.nan_to_num((raw - mean) / std, nan=0.0)
    return PublicHearts(torch.cat(images), torch.cat(masks), standardised, mean, std, correlation)


def pretrain(config: Config, out: Path, minutes: float | None = None) -> None:
    """Train the generator and write the prior with a card beside it; goes on from `out`'s checkpoint where one lies.

    Args:
        config: `pretrain`, `seed` and `device` are used.
        out: The prior's file, ending in .safetensors.
        minutes: Stop by then, with the learning rate brought to zero; None trains `pretrain.num_steps`.

    Raises:
        UserError: The folder is not writable or the checkpoint belongs to other settings.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        hearts = simulate_hearts(config.pretrain.num_hearts, config.seed)
        trainer = _Trainer(config, hearts, out.with_suffix(".checkpoint"))
        trainer.run(minutes)
        card = trainer.card()
        save_prior(
            out,
            trainer.ema,
            hearts.code_mean,
            hearts.code_std,
            hearts.code_correlation,
            {name: json.dumps(value) for name, value in card.items()},
        )
        out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


class _Trainer:
    """Everything that must survive a restart: weights, their average, optimiser, step, seconds."""

    def __init__(self, config: Config, hearts: PublicHearts, checkpoint: Path):
        self.settings: PretrainConfig = config.pretrain
        self.seed, self.device = config.seed, pick_device(config.device)
        self.hearts, self.checkpoint = hearts, checkpoint
        torch.manual_seed(config.seed)
        start = load_prior(Path(self.settings.start)) if self.settings.start else None
        self.start_sha256 = start.sha256 if start else None
        self.generator = (start.generator if start else Generator()).train().requires_grad_(True).to(self.device)
        self.ema = Generator(self.generator.architecture).to(self.device)
        self.ema.load_state_dict(self.generator.state_dict())
        self.optimizer = torch.optim.AdamW(self.generator.parameters(), lr=1e-8, weight_decay=WEIGHT_DECAY)
        self.step, self.elapsed_s, self.loss = 0, 0.0, float("nan")
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
        images, masks, codes = self.hearts.draw(self.settings.batch_size, rng)
        t, noise = torch.rand(len(images), generator=rng), torch.randn(images.shape, generator=rng)
        batch = [x.to(self.device) for x in (images, masks, codes, t, noise)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.learning_rate, self.step, done)
        with autocast(self.device):
            loss = flow_matching_loss(self.generator, *batch).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value
        decay = ema_decay(self.settings.ema_decay, self.step)
        with torch.no_grad():
            for mean, weight in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)

    def _fingerprint(self) -> str:
        """What must be equal for a checkpoint to be continued."""
        s = self.settings
        return json.dumps([self.seed, s.start, s.num_hearts, s.batch_size, s.learning_rate, s.ema_decay])

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
