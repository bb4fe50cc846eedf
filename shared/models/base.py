"""What every generative model is: a loss, a sampler, and the adapters that a federation may train.

Network, parameterisation and sampler are apart, as in Karras et al. (2022), https://arxiv.org/abs/2206.00364: the U-Net
(`networks/unet.py`) predicts something, a kind says what and turns it into a velocity, and one sampler follows the
velocity from noise to image.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcmr.shared.adapters import ADAPTERS, Adapter
from fedcmr.shared.holding import holding
from fedcmr.shared.models.networks.autoencoder import Autoencoder
from fedcmr.shared.models.networks.low_rank import LowRankLinear
from fedcmr.shared.models.networks.unet import Architecture, UNet
from fedcmr.shared.models.path import integrate, interpolate


@dataclass(frozen=True)
class Condition:
    """What an image is to show, and how.

    Attributes:
        masks: Shape (N, 2, H, W), uint8 labels 0..3, ED and ES; H and W divisible by 16. A model whose architecture
            has `unknown_labels` may be told 255 where nobody drew.
        style: Shape (N, K), standardised style vectors.
    """

    masks: Tensor
    style: Tensor

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: Tensor | slice) -> "Condition":
        return Condition(self.masks[index], self.style[index])

    def to(self, device: torch.device) -> "Condition":
        """The same on a device."""
        return Condition(self.masks.to(device), self.style.to(device))


@dataclass(frozen=True)
class Sampler:
    """How an image is sampled.

    Attributes:
        num_steps: Calls of the network.
        t_start: In [0, 1): where the path is entered, 0 at pure noise, towards 1 near the guide.
    """

    num_steps: int
    t_start: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"Expected num_steps >= 1, got {self.num_steps}.")
        if not 0 <= self.t_start < 1:
            raise ValueError(f"Expected t_start in [0, 1), got {self.t_start}.")


class GenerativeModel(nn.Module, ABC):
    """Generates ED and ES together, given their masks and a style vector.

    A kind implements `loss_at` and `velocity`; one whose images live in a latent space also has an autoencoder. Only an
    adapter is fine-tuned at the sites, and every kind's adapters are the same parameters of the same U-Net.

    Attributes:
        architecture: Sizes of the U-Net.
        unet: The network.
        autoencoder: Between images and latents, trained before the U-Net; None where images stay pixels.
        t_min: Where the path is entered at the earliest.
    """

    t_min = 0.0

    def __init__(self, architecture: Architecture, unet: UNet, autoencoder: Autoencoder | None = None):
        super().__init__()
        self.architecture = architecture
        self.unet = unet
        self.autoencoder = autoencoder

    @abstractmethod
    def loss_at(self, images: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Tensor:
        """The loss for given draws, so that models may be compared on equal ones.

        Args:
            images: Shape (N, 2, H, W), ED and ES, float32 in [-1, 1].
            condition: Masks and style vectors of the N images.
            t: Shape (N,), uniform in [0, 1): how far on the way from noise to image, by the kind's own schedule.
            noise: Shape (N, 2, H, W), standard normal.

        Returns:
            Shape (N,), float32. Not averaged: the caller averages per patient before clipping.
        """

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Velocity of the linear path at time `t`.

        Args:
            x_t: Shape (N, C, h, w), as `encode` gives it.
            t: Shape (N,), in [`t_min`, 1).
            condition: Masks and style vectors of the N images.

        Returns:
            Shape (N, C, h, w), float32.
        """

    def loss(self, images: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        """The training loss, one value per image.

        Args:
            images: Shape (N, 2, H, W), ED and ES, float32 in [-1, 1].
            condition: Masks and style vectors of the N images, on their device.
            rng: A generator of the CPU, the source of times and noise, drawn in this order.

        Returns:
            Shape (N,), float32. Not averaged: the caller averages per patient before clipping.
        """
        t = torch.rand(len(images), generator=rng)
        noise = torch.randn(images.shape, generator=rng)
        return self.loss_at(images, condition, t.to(images.device), noise.to(images.device))

    @torch.no_grad()
    def sample(
        self, condition: Condition, sampler: Sampler, rng: torch.Generator, guide: Tensor | None = None
    ) -> Tensor:
        """Generate images.

        Args:
            condition: Masks and style vectors of the N images.
            sampler: Where the path is entered, and in how many steps it is followed.
            rng: A generator of the CPU, the source of the noise.
            guide: Shape (N, 2, H, W) in [-1, 1], a rough image of the same masks, from which the sampler starts with
                noise added (SDEdit, Meng et al. 2022, https://arxiv.org/abs/2108.01073); None starts from noise alone.

        Returns:
            Shape (N, 2, H, W), in [-1, 1].
        """
        device = condition.masks.device
        noise = self.as_noise(torch.randn(condition.masks.shape, generator=rng).to(device))
        t_start = self.t_min if guide is None else max(sampler.t_start, self.t_min)
        start = torch.zeros_like(noise) if guide is None else self.encode(guide)
        x = interpolate(noise, start, torch.full((len(condition),), t_start, device=device))
        x = integrate(lambda x_t, t: self.velocity(x_t, t, condition), x, t_start, sampler.num_steps)
        return self.decode(x).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 2, H, W) -> where the path ends, (N, C, h, w): themselves, or their latents."""
        return images if self.autoencoder is None else self.autoencoder.encode(images)

    @torch.no_grad()
    def decode(self, x_1: Tensor) -> Tensor:
        """The inverse of `encode`, as far as there is one."""
        return x_1 if self.autoencoder is None else self.autoencoder.decode(x_1)

    def as_noise(self, noise: Tensor) -> Tensor:
        """Noise (N, 2, H, W) of images -> noise of the path; latents take as much of it as they have numbers."""
        if self.autoencoder is None:
            return noise
        num, height, width = len(noise), *noise.shape[-2:]
        channels, side = self.autoencoder.channels, self.autoencoder.side
        shape = (num, channels, height // side, width // side)
        return noise.flatten(1)[:, : channels * shape[2] * shape[3]].reshape(shape)

    def adapters(self) -> dict[Adapter, dict[str, nn.Parameter]]:
        """What a federation may train: adapter -> its parameters by name, see `trainable`."""
        return {adapter: self.trainable(adapter) for adapter in ADAPTERS}

    def trainable(self, adapter: Adapter = "norm_affine") -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name, in the order of the names.

        norm_affine: The last decoder level's output norms and the final bias, 392 numbers.
        lora: B of the low-rank updates of both layers that read the style vector, 2048 numbers. The
            norm-affine part is not among them: with it the held-out loss fell less
            (`fedcmr.simulations.benchmarks.adapters`).
        statistics: No step is taken, so nothing of the norm-affine part that is sent along changes.

        All else is frozen: the privacy noise grows with the square root of the count of numbers.
        """
        if adapter == "lora":
            layers = {n: m for n, m in self.unet.named_modules() if isinstance(m, LowRankLinear)}
            return {f"{name}.lora_b": layers[name].low_rank() for name in sorted(layers)}
        chosen = {}
        last = len(self.architecture.channels) - 1
        for name, parameter in self.unet.named_parameters():
            is_decoder_norm = name.startswith(f"up_blocks.{last}.resnets.") and ".norm2." in name
            if is_decoder_norm or name.startswith("out.0.") or name == "out.2.conv.bias":
                chosen[name] = parameter
        return dict(sorted(chosen.items()))

    def freeze(self, adapter: Adapter = "norm_affine") -> "GenerativeModel":
        """Leave gradients on for `trainable(adapter)` only."""
        self.requires_grad_(False)
        for parameter in self.trainable(adapter).values():
            parameter.requires_grad_(True)
        return self

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
        """Within, the adapter of these names holds these values and is all that gradients flow to.

        Afterwards the model is as it was, whatever happened.

        Yields:
            The adapter's parameters.

        Raises:
            ValueError: Names or shapes are those of no adapter.
        """
        adapter = next((adapter for adapter in ADAPTERS if self.trainable(adapter).keys() == values.keys()), None)
        if adapter is None or any(p.shape != values[n].shape for n, p in self.trainable(adapter).items()):
            raise ValueError("Expected the names and shapes of an adapter's parameters.")
        with holding(self, self.trainable(adapter), values) as parameters:
            yield parameters
