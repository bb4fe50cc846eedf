"""The mask- and appearance-conditioned generator, and the file of its public prior."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedcmr.shared.adapters import ADAPTERS, Adapter
from fedcmr.shared.case import LV
from fedcmr.shared.checkpoint import check_header
from fedcmr.shared.errors import UserError
from fedcmr.shared.networks.low_rank import LowRankLinear
from fedcmr.shared.resources import resource
from fedcmr.shared.style import MAX_STYLE, STYLE_NAMES, StyleDistribution

SHIPPED_PRIOR = resource("shared/weights/prior.safetensors")
PATCH = 2
"""Side of the pixel blocks that become channels: a quarter of the positions, measured 3 times faster at equal width."""


MAX_LEVELS, MAX_CHANNELS = 8, 2048


@dataclass(frozen=True)
class Architecture:
    """Sizes of the generator, kept beside its weights."""

    channels: tuple[int, ...] = (64, 96, 128)
    num_res_blocks: int = 1
    norm_num_groups: int = 16


class Generator(nn.Module):
    """Paints ED and ES together: a MONAI diffusion U-Net that predicts the flow's velocity.

    The masks enter as one-hot channels beside the noisy picture, the appearance code through the same embedding as
    the time. Only a `trainable` part is fine-tuned at the sites.
    """

    def __init__(self, architecture: Architecture | None = None):
        super().__init__()
        self.architecture = architecture or Architecture()
        channels = self.architecture.channels
        unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=(2 + 2 * LV) * PATCH**2,
            out_channels=2 * PATCH**2,
            channels=channels,
            attention_levels=(False,) * len(channels),
            num_res_blocks=self.architecture.num_res_blocks,
            norm_num_groups=self.architecture.norm_num_groups,
            num_class_embeds=1,
        )
        self.unet = unet.to(memory_format=torch.channels_last)
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous_after_frozen_layers)
        # MONAI adds a class embedding to the time embedding; a code is a class with coordinates.
        width = 4 * channels[0]
        self.unet.class_embedding = nn.Sequential(
            LowRankLinear(len(STYLE_NAMES), width, seed=1), nn.SiLU(), LowRankLinear(width, width, seed=2)
        )

    def forward(self, x_t: Tensor, t: Tensor, masks: Tensor, code: Tensor) -> Tensor:
        """Velocity at time `t`.

        Args:
            x_t: Shape (N, 2, H, W), H and W divisible by 8.
            t: Shape (N,), in [0, 1].
            masks: Shape (N, 2, H, W), uint8 labels 0..3.
            code: Shape (N, K), standardised appearance code.

        Returns:
            Shape (N, 2, H, W).
        """
        labels = [(masks == label).to(x_t.dtype) for label in range(1, LV + 1)]
        packed = F.pixel_unshuffle(torch.cat([x_t, *labels], dim=1), PATCH)
        packed = packed.contiguous(memory_format=torch.channels_last)
        # The sinusoidal embedding expects timesteps in 0..1000.
        out = self.unet(packed, t * 1000, class_labels=code.clamp(-MAX_STYLE, MAX_STYLE))
        return F.pixel_shuffle(out, PATCH)

    def trainable(self, rung: Adapter = "affine") -> dict[str, nn.Parameter]:
        """The part that sites fine-tune on a rung, by name, in the order of the names.

        affine: The last decoder level's output norms and the final bias, 392 numbers.
        low_rank: B of the low-rank updates of both layers that read the appearance code, 2048 numbers. The
            affine part is not among them: with it the held-out loss fell less
            (`fedcmr.simulations.benchmarks.adapters`).
        moments: No step is taken, so nothing of the affine part that is sent along changes.

        All else is frozen: the privacy noise grows with the square root of the count of numbers.
        """
        if rung == "low_rank":
            layers = {n: m for n, m in self.unet.named_modules() if isinstance(m, LowRankLinear)}
            return {f"{name}.lora_b": layers[name].low_rank() for name in sorted(layers)}
        chosen = {}
        last = len(self.architecture.channels) - 1
        for name, parameter in self.unet.named_parameters():
            is_decoder_norm = name.startswith(f"up_blocks.{last}.resnets.") and ".norm2." in name
            if is_decoder_norm or name.startswith("out.0.") or name == "out.2.conv.bias":
                chosen[name] = parameter
        return dict(sorted(chosen.items()))

    def freeze(self, rung: Adapter = "affine") -> "Generator":
        """Leave gradients on for `trainable(rung)` only."""
        self.requires_grad_(False)
        for parameter in self.trainable(rung).values():
            parameter.requires_grad_(True)
        return self

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
        """Within, the trainable part of these names holds these values and is all that gradients flow to.

        Afterwards the generator is as it was, whatever happened.

        Yields:
            The trainable part.

        Raises:
            ValueError: Names or shapes are those of no rung.
        """
        rung = next((rung for rung in ADAPTERS if self.trainable(rung).keys() == values.keys()), None)
        if rung is None or any(p.shape != values[n].shape for n, p in self.trainable(rung).items()):
            raise ValueError("Expected the names and shapes of a rung's trainable part.")
        parameters = self.trainable(rung)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        had_gradients = [parameter.requires_grad for parameter in self.parameters()]
        try:
            self.freeze(rung)
            _copy(values, parameters)
            yield parameters
        finally:
            _copy(before, parameters)
            for parameter, flag in zip(self.parameters(), had_gradients, strict=True):
                parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Prior:
    """A generator trained on public simulated hearts, with the scale of its appearance codes.

    Attributes:
        generator: In evaluation mode, frozen but for its trainable part.
        code_mean: Shape (K,), of raw codes over the public hearts.
        code_std: Shape (K,).
        code_correlation: Shape (K, K).
        sha256: Of the file, in hex: a site and the server compare it before any round.
        made_by: What made it: command, seed, steps, minutes.
    """

    generator: Generator
    code_mean: Tensor
    code_std: Tensor
    code_correlation: Tensor
    sha256: str
    made_by: Mapping[str, str]

    @property
    def codes(self) -> StyleDistribution:
        """The standardised codes of the public hearts: mean 0, std 1."""
        return StyleDistribution(
            torch.zeros_like(self.code_mean), torch.ones_like(self.code_std), self.code_correlation
        )

    def standardise(self, raw_code: Tensor) -> Tensor:
        """Raw code(s) -> standardised; a region the patient lacks (NaN) gets the public mean, 0."""
        return torch.nan_to_num((raw_code - self.code_mean) / self.code_std, nan=0.0).clamp(-MAX_STYLE, MAX_STYLE)

    def raw(self, code: Tensor) -> Tensor:
        """Standardised code(s) -> raw, in picture units: the inverse of `standardise` within its limits."""
        return code * self.code_std + self.code_mean


def save_prior(
    path: Path,
    generator: Generator,
    code_mean: Tensor,
    code_std: Tensor,
    code_correlation: Tensor,
    made_by: dict[str, str],
) -> None:
    """Write weights as float16 (half the bytes, no measurable loss) with architecture and origin in the header.

    A prior holds no low-rank part.
    """
    weights = {name: value for name, value in generator.state_dict().items() if not name.endswith(".lora_b")}
    tensors = {f"generator.{name}": value.half().contiguous() for name, value in weights.items()}
    tensors |= {"code_mean": code_mean, "code_std": code_std, "code_correlation": code_correlation}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"architecture": json.dumps(asdict(generator.architecture)), **made_by})


def load_prior(path: Path | None = None) -> Prior:
    """Read a public prior.

    Args:
        path: Its file; None for the one that ships with the project.

    Raises:
        UserError: The file is missing or is not a prior of this version.
    """
    path = path or SHIPPED_PRIOR
    try:
        check_header(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="pt") as file:
            made_by = dict(file.metadata() or {})
            sizes = json.loads(made_by.pop("architecture"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        sizes["channels"] = tuple(sizes["channels"])
        if not 1 <= len(sizes["channels"]) <= MAX_LEVELS or max(sizes["channels"]) > MAX_CHANNELS:
            raise ValueError  # before a network of that size is made
        generator = Generator(Architecture(**sizes))
        generator.load_state_dict({n[10:]: v for n, v in tensors.items() if n.startswith("generator.")})
        code_mean, code_std, correlation = (tensors[f"code_{name}"] for name in ("mean", "std", "correlation"))
        if correlation.shape != (len(STYLE_NAMES), len(STYLE_NAMES)):
            raise ValueError
    except OSError:
        raise UserError(f"{path} cannot be read: give a prior made by 'fedcmr-server pretrain'") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, RecursionError):
        raise UserError(f"{path} is not a prior of this version: make one with 'fedcmr-server pretrain'") from None
    return Prior(generator.eval().freeze(), code_mean, code_std, correlation, sha256, made_by)


def _contiguous_after_frozen_layers(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    """On channels_last input PyTorch's CPU backward pass (2.13) crashes where only a norm's weight wants a gradient."""
    (x,) = inputs
    crashes = torch.is_grad_enabled() and norm.weight.requires_grad and not x.requires_grad
    return (x.contiguous(),) if crashes else None


def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Values into parameters, by name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
