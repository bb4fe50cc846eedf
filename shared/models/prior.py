"""The public prior: a generative model trained on public simulated hearts, and its file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedcmr.shared.checkpoint import check_header
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.base import GenerativeModel
from fedcmr.shared.models.kinds import KINDS, kind_of, make
from fedcmr.shared.models.networks.unet import Architecture
from fedcmr.shared.resources import resource
from fedcmr.shared.seen import fingerprints_in
from fedcmr.shared.style import MAX_STYLE, MEAN_KEY, STD_KEY, STYLE_NAMES, StyleDistribution
from fedcmr.shared.views import Grid

SHIPPED_PRIOR = resource("shared/weights/prior.safetensors")
FIRST_KIND = "flow_matching"
"""Files of earlier versions name no kind: there was this one."""
CORRELATION_KEY = "code_correlation"  # named like `MEAN_KEY` and `STD_KEY`, and for the same reason
MAX_LEVELS, MAX_CHANNELS, MAX_RES_BLOCKS, MAX_PATCH, MAX_SIZE_PX = 8, 2048, 8, 8, 512
"""Largest sizes of an architecture that a file may request."""


@dataclass(frozen=True)
class Prior:
    """A generative model trained on public simulated hearts, with the scale of its style vectors.

    Attributes:
        generator: The model, in evaluation mode, frozen but for the norm-affine adapter.
        style_mean: Shape (K,), of raw style vectors over the public hearts.
        style_std: Shape (K,).
        style_correlation: Shape (K, K).
        sha256: SHA-256 of the file, in hex: a site and the server compare it before any round.
        made_by: What made it: command, seed, steps, minutes.
    """

    generator: GenerativeModel
    style_mean: Tensor
    style_std: Tensor
    style_correlation: Tensor
    sha256: str
    made_by: Mapping[str, str]

    @property
    def grid(self) -> Grid:
        """The grid of the generator's images: whatever it is trained on or told is brought to this one."""
        return self.generator.architecture.grid

    @property
    def has_seen(self) -> frozenset[str]:
        """Fingerprints of the public patients whom it has learnt from; see `fedcmr.shared.case.fingerprint`."""
        return fingerprints_in(self.made_by)

    @property
    def styles(self) -> StyleDistribution:
        """The standardised style vectors of the public hearts: mean 0, std 1."""
        return StyleDistribution(
            torch.zeros_like(self.style_mean), torch.ones_like(self.style_std), self.style_correlation
        )

    def standardise(self, raw_vector: Tensor) -> Tensor:
        """Raw style vector(s) -> standardised; a region that a patient does not have (NaN) gets the public mean."""
        return torch.nan_to_num((raw_vector - self.style_mean) / self.style_std, nan=0.0).clamp(-MAX_STYLE, MAX_STYLE)

    def raw(self, vector: Tensor) -> Tensor:
        """Standardised style vector(s) -> raw, in grey values: the inverse of `standardise` within its limits."""
        return vector * self.style_std + self.style_mean


def save_prior(
    path: Path,
    generator: GenerativeModel,
    style_mean: Tensor,
    style_std: Tensor,
    style_correlation: Tensor,
    made_by: dict[str, str],
) -> None:
    """Write weights as float16 (half the bytes, no measurable loss) with kind, architecture and origin in the header.

    A prior holds no low-rank part.
    """
    weights = {name: value for name, value in generator.state_dict().items() if not name.endswith(".lora_b")}
    tensors = {f"generator.{name}": value.half().contiguous() for name, value in weights.items()}
    tensors |= {MEAN_KEY: style_mean, STD_KEY: style_std, CORRELATION_KEY: style_correlation}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"kind": kind_of(generator), "architecture": json.dumps(asdict(generator.architecture))}
    save_file(tensors, path, metadata={**made_by, **header})


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
            kind, sizes = made_by.pop("kind", FIRST_KIND), json.loads(made_by.pop("architecture"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        if kind not in KINDS:
            raise UserError(f"{path} holds a generative model of another kind than {', '.join(KINDS)}: update fedcmr")
        generator = make(kind, _architecture(sizes))
        generator.load_state_dict({n[10:]: v for n, v in tensors.items() if n.startswith("generator.")})
        mean, std, correlation = (tensors[name] for name in (MEAN_KEY, STD_KEY, CORRELATION_KEY))
        if correlation.shape != (len(STYLE_NAMES), len(STYLE_NAMES)):
            raise ValueError
    except OSError:
        raise UserError(f"{path} cannot be read: give a prior made by 'fedcmr-server pretrain'") from None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, RecursionError):
        raise UserError(f"{path} is not a prior of this version: make one with 'fedcmr-server pretrain'") from None
    return Prior(generator.eval().freeze(), mean, std, correlation, sha256, made_by)


def _architecture(sizes: dict[str, Any]) -> Architecture:
    """The architecture that a file requests, before a network of that size is made.

    Raises:
        ValueError, TypeError, KeyError: It is no architecture, or too large a one.
    """
    architecture = Architecture(**{**sizes, "channels": tuple(sizes["channels"])})
    channels = architecture.channels
    if not 1 <= len(channels) <= MAX_LEVELS or max(channels) > MAX_CHANNELS:
        raise ValueError
    if not 1 <= architecture.num_res_blocks <= MAX_RES_BLOCKS or not 1 <= architecture.patch <= MAX_PATCH:
        raise ValueError
    if not 16 <= architecture.size_px <= MAX_SIZE_PX or not 0.1 <= architecture.pixel_mm <= 10:
        raise ValueError
    return architecture
