"""What a training must keep to go on after an interruption as if there had been none: weights, average, optimiser."""

import copy
import math
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from fedcmr.shared import checkpoint

WARM_UP_SHARE, FIRST_FACTOR, LAST_FACTOR = 0.25, 1 / 25, 1e-4

Network = TypeVar("Network", bound=nn.Module)


class TrainingState(Generic[Network]):
    """A network, the exponential moving average of it, and AdamW.

    Attributes:
        model: The network that is trained.
        ema: Its average; what is used in the end.
        optimizer: Weights decay, biases and normalisation do not.
    """

    def __init__(self, model: Network, weight_decay: float) -> None:
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def step(self, loss: Tensor, rate: float, max_grad_norm: float, ema_decay: float) -> None:
        """One step of the optimiser with this learning rate, then of the average (weights and batch statistics)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        target = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        average = [value for value in self.ema.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(average, target, 1 - ema_decay)

    def save(self, path: Path, identity: str, step: int) -> None:
        """Write everything the next step needs as one safetensors file, atomically."""
        arrays = {name: value.detach().cpu().numpy() for name, value in self._tensors().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{index}.{key}": value.cpu().numpy() for key, value in state.items()}
        checkpoint.save(path, arrays, {"identity": identity, "step": step})

    def restore(self, path: Path, identity: str) -> int:
        """Load a checkpoint that was saved under the same identity.

        Returns:
            The step to go on with; 0 where there is no such checkpoint.
        """
        if not path.is_file():
            return 0
        arrays, metadata = checkpoint.load(path)
        if metadata.get("identity") != identity:
            return 0
        for name, value in self._tensors().items():
            value.copy_(torch.from_numpy(arrays[name]).reshape(value.shape))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, array in arrays.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                value = torch.from_numpy(array)
                # The fused step walks memory, so moments need the parameter's own layout (channels last).
                moment = value.reshape(()) if key == "step" else torch.empty_like(parameters[int(index)]).copy_(value)
                state.setdefault(int(index), {})[key] = moment.detach()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return int(metadata["step"])

    def _tensors(self) -> dict[str, Tensor]:
        """Both networks' tensors under one name each; they share memory with the networks."""
        both = (("model", self.model), ("ema", self.ema))
        return {f"{prefix}.{name}": value for prefix, net in both for name, value in net.state_dict().items()}


def one_cycle(step: int, num_steps: int, peak: float) -> float:
    """The learning rate of a step: one cycle with cosine ramps.

    Smith & Topin (2018), https://arxiv.org/abs/1708.07120, in the shape of `torch.optim.lr_scheduler.OneCycleLR`.
    """
    first, last = peak * FIRST_FACTOR, peak * FIRST_FACTOR * LAST_FACTOR
    top = WARM_UP_SHARE * num_steps - 1
    if step <= top:
        return peak + (first - peak) * (1 + math.cos(math.pi * step / max(top, 1e-9))) / 2
    return last + (peak - last) * (1 + math.cos(math.pi * (step - top) / max(num_steps - 1 - top, 1))) / 2
