"""A network whose trainable part holds other values for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def holding(
    network: nn.Module, parameters: dict[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """Within, these parameters of a network hold these values and are all that gradients flow to.

    Afterwards the network is as it was, whatever happened.

    Args:
        network: Left as it was.
        parameters: Its trainable part, by name.
        values: By the same names, of the same shapes.

    Yields:
        The parameters.

    Raises:
        ValueError: Names or shapes are others.
    """
    if parameters.keys() != values.keys() or any(p.shape != values[name].shape for name, p in parameters.items()):
        raise ValueError("Expected the names and shapes of the trainable part.")
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    had_gradients = [parameter.requires_grad for parameter in network.parameters()]
    try:
        network.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        _copy(values, parameters)
        yield parameters
    finally:
        _copy(before, parameters)
        for parameter, flag in zip(network.parameters(), had_gradients, strict=True):
            parameter.requires_grad_(flag)


def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Values into parameters, by name."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
