"""The adapters: which part of the generator a federation may change, from the cheapest in privacy to the dearest."""

from typing import Literal, get_args

Adapter = Literal["moments", "affine", "low_rank"]
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)
"""Style statistics alone; the norms' affine parameters with them; low-rank updates (LoRA) of the linear layers too."""
