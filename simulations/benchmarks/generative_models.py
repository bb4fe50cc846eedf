"""Kinds of generators that could have been built, in one frame: where pictures live, and what the network learns there.

The frame is that of `fedcmr.shared.networks.generator`: MONAI's diffusion U-Net with the same widths reads masks, time
and appearance code and moves noise to a picture along the linear path. Pixels in blocks of two and the path's velocity
make the kind that the project has.
"""

import math
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor, nn

from fedcmr.server.generation.pretraining import MAX_GRAD_NORM, WEIGHT_DECAY, PublicHearts, ema_decay, learning_rate
from fedcmr.server.settings import PretrainConfig
from fedcmr.server.training.state import TrainingState
from fedcmr.shared.case import LV
from fedcmr.shared.device import autocast
from fedcmr.shared.diffusion import integrate, interpolate
from fedcmr.shared.networks.generator import Architecture
from fedcmr.shared.progress import track
from fedcmr.shared.style import MAX_STYLE, STYLE_NAMES

PRETRAIN = PretrainConfig()
"""Batches, learning rate and average are those of the public prior's training."""
AUTOENCODER_SHARE = 0.25
"""Of the minutes, for the autoencoder of a latent space."""
KL_WEIGHT = 1e-6
LATENT_CHANNELS, LATENT_SIDE = 8, 4
NUM_SCALE_PAIRS = 512
"""Pairs whose latents say how these are standardised."""

Target = Literal["velocity", "noise"]


class Blocks(nn.Module):
    """Pixels in blocks that become channels: the grid is `side` times smaller, and nothing is lost."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.channels, self.limit = side, 2 * side**2, 1.0

    def encode(self, images: Tensor) -> Tensor:
        """(N, 2, H, W) -> (N, channels, H / side, W / side)."""
        return F.pixel_unshuffle(images, self.side)

    def decode(self, points: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(points, self.side)


class Small(nn.Module):
    """Pictures of half the size, enlarged again at the end: what is finer than two pixels is lost."""

    side, channels, limit = 2, 2, 1.0

    def encode(self, images: Tensor) -> Tensor:
        """(N, 2, H, W) -> (N, 2, H / 2, W / 2)."""
        return F.avg_pool2d(images, self.side)

    def decode(self, points: Tensor) -> Tensor:
        """(N, 2, H / 2, W / 2) -> (N, 2, H, W), bilinearly."""
        return F.interpolate(points, scale_factor=self.side, mode="bilinear")


class Latent(nn.Module):
    """Latents of an autoencoder (Rombach et al. 2022, https://arxiv.org/abs/2112.10752), standardised by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.side, self.channels, self.limit = LATENT_SIDE, LATENT_CHANNELS, 4.0
        self.autoencoder = AutoencoderKL(
            spatial_dims=2,
            in_channels=2,
            out_channels=2,
            num_res_blocks=(1, 1, 1),
            channels=(32, 64, 64),
            attention_levels=(False, False, False),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=16,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.zeros(1, LATENT_CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, LATENT_CHANNELS, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """(N, 2, H, W) -> (N, 8, H / 4, W / 4)."""
        return (self._latent(images)[0] - self.mean) / self.std

    def decode(self, points: Tensor) -> Tensor:
        """(N, 8, H / 4, W / 4) -> (N, 2, H, W)."""
        with autocast(points.device):
            return self.autoencoder.decode(points * self.std + self.mean).float().clamp(-1, 1)

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """Absolute error of the pictures, and the latents' divergence from a normal distribution."""
        mean, spread = self._latent(images)
        divergence = 0.5 * (mean.square() + spread.square() - 2 * spread.log() - 1).sum(dim=(1, 2, 3)).mean()
        with autocast(images.device):
            decoded = self.autoencoder.decode(mean + spread * noise).float()
        return (decoded - images).abs().mean() + KL_WEIGHT * divergence

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Bring the latents of these pictures to mean 0 and standard deviation 1."""
        latents = torch.cat([self._latent(part)[0] for part in images.split(PRETRAIN.batch_size)])
        self.mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))

    def _latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device):
            mean, spread = self.autoencoder.encode(images.contiguous(memory_format=torch.channels_last))
        return mean.float(), spread.float()


class Painter(nn.Module):
    """A generator of one kind.

    Args:
        space: Where pictures live.
        target: What the network predicts: the velocity of the linear path (flow matching), or the noise that was added
            on a cosine schedule (diffusion, Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672).
    """

    def __init__(self, space: Blocks | Small | Latent, target: Target):
        super().__init__()
        self.space, self.target = space, target
        architecture = Architecture()
        channels = architecture.channels
        unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=space.channels + 2 * LV * space.side**2,
            out_channels=space.channels,
            channels=channels,
            attention_levels=(False,) * len(channels),
            num_res_blocks=architecture.num_res_blocks,
            norm_num_groups=architecture.norm_num_groups,
            num_class_embeds=1,
        )
        width = 4 * channels[0]
        unet.class_embedding = nn.Sequential(nn.Linear(len(STYLE_NAMES), width), nn.SiLU(), nn.Linear(width, width))
        self.unet = unet.to(memory_format=torch.channels_last)

    def loss(self, points: Tensor, masks: Tensor, code: Tensor, draw: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of what is predicted.

        Args:
            points: Shape (N, channels, h, w), encoded pictures.
            masks: Shape (N, 2, H, W), uint8 labels 0..3.
            code: Shape (N, K), standardised appearance codes.
            draw: Shape (N,), uniform in [0, 1); how far on the way from noise to picture follows from it.
            noise: Of the points' shape, standard normal.
        """
        if self.target == "velocity":
            return F.mse_loss(self._predict(interpolate(noise, points, draw), draw, masks, code), points - noise)
        angle = (1 - draw) * (math.pi / 2)  # of the cosine schedule: picture times cos, noise times sin
        t = angle.cos() / (angle.cos() + angle.sin())  # where the linear path has as much noise to its picture
        return F.mse_loss(self._predict(interpolate(noise, points, t), t, masks, code), noise)

    def forward(self, x_t: Tensor, t: Tensor, masks: Tensor, code: Tensor) -> Tensor:
        """Velocity of the linear path at (N, channels, h, w) and time `t` > 0, shape (N,).

        Predicted noise becomes a velocity by way of the picture that it tells, within the limits of its space. A step
        along it is one of DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502).
        """
        predicted = self._predict(x_t, t, masks, code)
        if self.target == "velocity":
            return predicted
        t = t[:, None, None, None]
        picture = ((x_t - (1 - t) * predicted) / t).clamp(-self.space.limit, self.space.limit)
        return (picture - x_t) / (1 - t)

    @torch.no_grad()
    def paint(
        self, sketch: Tensor, masks: Tensor, code: Tensor, noise: Tensor, start_t: float, num_steps: int
    ) -> Tensor:
        """Pictures (N, 2, H, W) in [-1, 1]; arguments as of `shared.diffusion.sample`, the noise that of pictures.

        A latent space takes as much of the noise as it has channels for.
        """
        points = self.space.encode(sketch)
        noise = noise.flatten()[: points.numel()].reshape(points.shape)
        return self.space.decode(integrate(self, masks, code, points, noise, start_t, num_steps)).clamp(-1, 1)

    def _predict(self, x_t: Tensor, t: Tensor, masks: Tensor, code: Tensor) -> Tensor:
        if self.target == "noise":  # its network reads pictures whose variance stays the same on the way
            scale = (t.square() + (1 - t).square()).sqrt()[:, None, None, None]
            x_t = x_t / scale
        labels = torch.cat([(masks == label).to(x_t.dtype) for label in range(1, LV + 1)], dim=1)
        packed = torch.cat([x_t, F.pixel_unshuffle(labels, self.space.side)], dim=1)
        with autocast(x_t.device):
            out = self.unet(
                packed.contiguous(memory_format=torch.channels_last),
                t * 1000,
                class_labels=code.clamp(-MAX_STYLE, MAX_STYLE),
            )
        return out.float()


KINDS: dict[str, Callable[[], Painter]] = {
    "flow, blocks of 2": lambda: Painter(Blocks(2), "velocity"),
    "diffusion, blocks of 2": lambda: Painter(Blocks(2), "noise"),
    "flow, every pixel": lambda: Painter(Blocks(1), "velocity"),
    "flow, blocks of 4": lambda: Painter(Blocks(4), "velocity"),
    "flow, 32 pixels": lambda: Painter(Small(), "velocity"),
    "flow, latent space": lambda: Painter(Latent(), "velocity"),
}
"""The project's first. All but the second by the path's velocity."""


def train(name: str, hearts: PublicHearts, seconds: float, seed: int) -> tuple[Painter, int]:
    """Train a generator of one kind for so many seconds, the autoencoder of a latent space within them.

    Returns:
        The generator, the average of its weights in evaluation mode, and the number of its steps.
    """
    torch.manual_seed(seed)
    painter, rng = KINDS[name](), torch.Generator().manual_seed(seed)
    space = painter.space
    if isinstance(space, Latent):

        def reconstruction() -> Tensor:
            images, _, _ = hearts.draw(PRETRAIN.batch_size, rng)
            size = images.shape[-1] // LATENT_SIDE
            return space.loss(images, torch.randn((len(images), LATENT_CHANNELS, size, size), generator=rng))

        _fit(space, reconstruction, AUTOENCODER_SHARE * seconds, f"{name}: autoencoder")
        space.requires_grad_(False)
        space.standardise(hearts.pictures(slice(NUM_SCALE_PAIRS)))
        seconds *= 1 - AUTOENCODER_SHARE

    def prediction() -> Tensor:
        images, masks, codes = hearts.draw(PRETRAIN.batch_size, rng)
        with torch.no_grad():
            points = space.encode(images)
        draw, noise = torch.rand(len(images), generator=rng), torch.randn(points.shape, generator=rng)
        return painter.loss(points, masks, codes, draw, noise)

    num_steps = _fit(painter, prediction, seconds, name)
    return painter.eval().requires_grad_(False), num_steps


def _fit(module: nn.Module, loss: Callable[[], Tensor], seconds: float, description: str) -> int:
    """Take steps for so many seconds, leave the average of the weights in `module`, and count the steps."""
    state = TrainingState(module, WEIGHT_DECAY)
    num_steps, started = 0, time.monotonic()
    for second in track(range(math.ceil(seconds)), description):
        while (passed := time.monotonic() - started) < min(second + 1, seconds):
            rate = learning_rate(PRETRAIN.learning_rate, num_steps, passed / seconds)
            num_steps += 1
            state.step(loss(), rate, MAX_GRAD_NORM, ema_decay(PRETRAIN.ema_decay, num_steps))
    module.load_state_dict(state.ema.state_dict())
    return num_steps
