"""The adapters: which part of the generator a federation may change, from the cheapest in privacy to the dearest."""

from collections.abc import Mapping
from typing import Literal, get_args

Adapter = Literal["statistics", "norm_affine", "lora"]
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)
"""Style statistics alone; the norms' affine parameters with them; low-rank updates (LoRA) of the linear layers too."""
EARLIER_NAMES: Mapping[str, str] = {"moments": "statistics", "affine": "norm_affine", "low_rank": "lora"}
"""Names in files of earlier versions -> today's: of the adapters, and of the task "statistics" of a study's round 1."""


def present_name(name: str) -> str:
    """Today's name of an adapter or a task that a file names."""
    return EARLIER_NAMES.get(name, name)
