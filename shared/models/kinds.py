"""The kinds of generative models: a new one is a file next to this one and a line here."""

from collections.abc import Callable

from fedcmr.shared.models.base import GenerativeModel
from fedcmr.shared.models.diffusion import Diffusion
from fedcmr.shared.models.flow_matching import FlowMatching
from fedcmr.shared.models.latent_flow import LatentFlow
from fedcmr.shared.models.networks.unet import Architecture

KINDS: dict[str, Callable[[Architecture | None], GenerativeModel]] = {
    "flow_matching": FlowMatching,
    "diffusion": Diffusion,
    "latent_flow": LatentFlow,
}
"""`generator.kind` -> what it makes of an `Architecture`."""


def make(kind: str, architecture: Architecture | None = None) -> GenerativeModel:
    """An untrained model of a kind; None takes the sizes of the shipped prior."""
    return KINDS[kind](architecture)


def kind_of(model: GenerativeModel) -> str:
    """The name of a model's kind."""
    return next(kind for kind, made in KINDS.items() if type(model) is made)
