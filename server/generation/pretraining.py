"""Trains the public prior: a generative model on simulated hearts with randomised appearance, and on public scans."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmr.server.generation.public_hearts import (
    PublicHearts,
    PublicScans,
    hide_labels,
    read_scans,
    simulate_hearts,
    with_scans,
)
from fedcmr.server.settings import Config, GeneratorConfig, PretrainConfig
from fedcmr.server.training.loop import Budget, Checkpoints, Recipe, train
from fedcmr.server.training.schedule import cosine, ema_decay
from fedcmr.server.training.state import Network, TrainingState
from fedcmr.shared.case import fingerprint
from fedcmr.shared.device import autocast, pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.base import Condition, GenerativeModel
from fedcmr.shared.models.kinds import kind_of, make
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.models.prior import load_prior, save_prior

CHECKPOINT_STEPS = 200
AUTOENCODER_SHARE = 0.25
"""Share of the training for the autoencoder, in models that have one; the U-Net is trained after it."""
NUM_SCALE_IMAGES = 512
"""Number of images from whose latents the standardisation of latents is computed."""
OF_THE_GRID = ("patch", "size_px", "pixel_mm", "unknown_labels")
"""In these a prior may differ from the one that it starts from: only the layers that read and write pixels depend on
them, and begin anew."""
WARM_UP_STEPS, MAX_GRAD_NORM, WEIGHT_DECAY = 200, 1.0, 0.01


def pretrain(config: Config, out: Path, minutes: float | None = None, public: Sequence[Path] = ()) -> None:
    """Train the generative model and write the prior with a card next to it; resumes from `out`'s checkpoint if any.

    Args:
        config: `generator`, `pretrain`, `seed` and `device` are used.
        out: The prior's file, ending in .safetensors.
        minutes: Stop by then, with the learning rate brought to zero; None trains `pretrain.num_steps`.
        public: Folders of prepared public scans to learn from, beside simulated hearts.

    Raises:
        UserError: The folder is not writable, the checkpoint belongs to other settings, the prior to start
            from is of another kind or size, or a folder holds no public scans.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        grid = architecture_of(config.generator).grid
        scans = read_scans(public)
        hearts = simulate_hearts(config.pretrain.num_hearts, config.seed, grid)
        if scans.cases:
            hearts = with_scans(hearts, scans.cases, grid, partly=config.generator.unknown_labels)
        result = train_prior(config, hearts, out.with_suffix(".checkpoint"), minutes)
        card = _card(config, result, scans)
        scale = (hearts.style_mean, hearts.style_std, hearts.style_correlation)
        save_prior(out, result.model, *scale, {name: json.dumps(value) for name, value in card.items()})
        out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}") from None


@dataclass(frozen=True)
class Pretrained:
    """A generative model after its training.

    Attributes:
        model: The network with averaged weights, which becomes the prior.
        num_steps: Steps of the optimiser, including those of an autoencoder.
        elapsed_s: Seconds of training.
        loss: Exponential average of the last part's loss.
        start_sha256: SHA-256 of the prior that the training began with; None where it began with random weights.
    """

    model: GenerativeModel
    num_steps: int
    elapsed_s: float
    loss: float
    start_sha256: str | None


def train_prior(config: Config, hearts: PublicHearts, checkpoint: Path, minutes: float | None) -> Pretrained:
    """Train the kind of model that the settings name, the autoencoder of its latent space first where it has one.

    Args:
        config: As for `pretrain`.
        hearts: The training set.
        checkpoint: The training's file, resumed from if it is there; that of an autoencoder lies next to it. Both stay.
        minutes: As for `pretrain`.

    Raises:
        UserError: A checkpoint belongs to other settings, or the prior to start from is of another kind.
    """
    settings, device = config.pretrain, pick_device(config.device)
    torch.manual_seed(config.seed)
    model, start_sha256 = _first_model(config)
    model.train().requires_grad_(True).to(device)

    def identity(part: str) -> str:
        s = settings
        values = [part, config.seed, s.start, s.num_hearts, s.batch_size, s.learning_rate, s.ema_decay]
        if hearts.num_scanned:
            scanned = hearts.images[-hearts.num_scanned :]
            values += [settings.scan_share, hearts.num_scanned, int(scanned.sum(dtype=torch.int64))]
        return json.dumps([*values, asdict(config.generator)])

    def batch(step: int) -> tuple[Tensor, Condition, torch.Generator]:
        rng = torch.Generator().manual_seed(config.seed * 7_368_787 + step)
        images, masks, styles = hearts.draw(settings.batch_size, rng, settings.scan_share)
        if config.generator.unknown_labels:
            masks = hide_labels(masks, rng)
        return images.to(device), Condition(masks, styles).to(device), rng

    num_steps, elapsed_s = 0, 0.0
    if model.autoencoder is not None and start_sha256 is None:
        state = _state(model.autoencoder)
        path = checkpoint.with_name(f"{checkpoint.name}.autoencoder")

        def autoencoder_loss(step: int) -> Tensor:
            images, _, rng = batch(step)
            with autocast(device):
                return state.model.loss(images, rng).mean()

        share = AUTOENCODER_SHARE
        budget = Budget(math.ceil(share * settings.num_steps), None if minutes is None else share * minutes)
        kept = Checkpoints(path, identity("autoencoder"), CHECKPOINT_STEPS, kept=True, refuse_others=True)
        train(state, autoencoder_loss, _recipe(settings), budget, "training the autoencoder", kept)
        model.autoencoder.load_state_dict(state.ema.state_dict())
        with autocast(device):
            model.autoencoder.standardise(hearts.chosen(slice(NUM_SCALE_IMAGES)).to(device))
        num_steps, elapsed_s = state.num_steps, state.elapsed_s
        minutes = None if minutes is None else (1 - share) * minutes
    if model.autoencoder is not None:
        model.zero_grad()  # the last gradients of its own training would count in the next steps' norm
        model.autoencoder.requires_grad_(False)
    whole = _state(model)
    first = num_steps

    def loss(step: int) -> Tensor:
        images, condition, rng = batch(first + step)
        with autocast(device):
            return whole.model.loss(images, condition, rng).mean()

    kept = Checkpoints(checkpoint, identity("model"), CHECKPOINT_STEPS, kept=True, refuse_others=True)
    budget = Budget(max(settings.num_steps - first, 1), minutes)
    train(whole, loss, _recipe(settings), budget, "training the prior", kept)
    return Pretrained(whole.ema, first + whole.num_steps, elapsed_s + whole.elapsed_s, whole.loss, start_sha256)


def _first_model(config: Config) -> tuple[GenerativeModel, str | None]:
    """The model before its first step, and the SHA-256 of the prior that it comes from, if any."""
    start, kind, architecture = config.pretrain.start, config.generator.kind, architecture_of(config.generator)
    if start is None:
        return make(kind, architecture), None
    prior = load_prior(Path(start))
    if kind_of(prior.generator) != kind:
        raise UserError(
            f"pretrain.start: {start} is of kind {kind_of(prior.generator)}, expected {kind} as in generator.kind"
        )
    earlier = prior.generator.architecture
    if replace(architecture, **{name: getattr(earlier, name) for name in OF_THE_GRID}) != earlier:
        raise UserError(f"pretrain.start: {start} has other sizes than the settings of 'generator'")
    if architecture == earlier:
        return prior.generator, prior.sha256
    model = make(kind, architecture)
    weights = model.state_dict()
    learnt = prior.generator.state_dict().items()
    model.load_state_dict({**weights, **{name: w for name, w in learnt if w.shape == weights[name].shape}})
    return model, prior.sha256


def architecture_of(settings: GeneratorConfig) -> Architecture:
    """The sizes of the network and the grid of its images."""
    return Architecture(
        tuple(settings.channels),
        patch=settings.patch,
        size_px=settings.size_px,
        pixel_mm=settings.pixel_mm,
        unknown_labels=settings.unknown_labels,
    )


def _state(model: Network) -> TrainingState[Network]:
    """A network before its first step, with every parameter decaying alike."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TrainingState(model, optimizer=torch.optim.AdamW(trained, weight_decay=WEIGHT_DECAY))


def _recipe(settings: PretrainConfig) -> Recipe:
    """A linear warm-up and a cosine; an average that forgets the first steps."""
    return Recipe(
        lambda step, done: cosine(step, done, settings.learning_rate, WARM_UP_STEPS),
        lambda step, done: ema_decay(settings.ema_decay, step + 1),
        MAX_GRAD_NORM,
    )


def _card(config: Config, result: Pretrained, scans: PublicScans) -> dict[str, Any]:
    """What made the prior, for the file next to it; whom the prior to start from has seen, this one has seen too."""
    start, keys = config.pretrain.start, ("public_scans", "terms", "has_seen")
    made_by = load_prior(Path(start)).made_by if start else {}
    earlier = {key: json.loads(made_by[key]) for key in keys if key in made_by}
    return {
        "command": "fedcmr-server pretrain",
        "kind": config.generator.kind,
        "pixels": f"{config.generator.size_px} of {config.generator.pixel_mm:g} mm",
        "seed": config.seed,
        "num_hearts": config.pretrain.num_hearts,
        "public_scans": {**earlier.get("public_scans", {}), **scans.sets},
        "terms": list(dict.fromkeys([*earlier.get("terms", ()), *scans.terms])),
        "has_seen": sorted({*earlier.get("has_seen", ()), *(fingerprint(case) for case in scans.cases)}),
        "num_steps": result.num_steps,
        "batch_size": config.pretrain.batch_size,
        "elapsed_minutes": round(result.elapsed_s / 60, 1),
        "device": pick_device(config.device).type,
        "threads": torch.get_num_threads(),
        "final_loss": round(result.loss, 5),
        "torch": torch.__version__,
        "start_sha256": result.start_sha256,
    }
