"""Everything that a training must keep to resume after an interruption as if there had been none."""

import copy
import math
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fedcmr.shared import checkpoint
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError

Network = TypeVar("Network", bound=nn.Module)


class TrainingState(Generic[Network]):
    """A network, the exponential moving average of it, its optimiser, and what was trained so far.

    Args:
        model: The network to train.
        weight_decay: Weight decay of AdamW; biases and normalisation do not decay.
        optimizer: Optimiser to use instead of AdamW; its learning rate is set anew at every step.

    Attributes:
        model: The network that is trained.
        ema: Its average, which is used after the training.
        optimizer: Optimiser of the model's parameters.
        num_steps: Number of steps taken.
        elapsed_s: Seconds of training, including those before interruptions.
        loss: Exponential average of the loss; NaN before the first step.
        recent: Losses since the last entry of `history`.
        history: (steps, mean loss of those since the entry before).
    """

    def __init__(
        self, model: Network, weight_decay: float = 0.0, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = optimizer or adamw(model, weight_decay)
        self.num_steps, self.elapsed_s, self.loss = 0, 0.0, math.nan
        self.recent: list[float] = []
        self.history: list[tuple[int, float]] = []

    def step(self, loss: Tensor, rate: float, max_grad_norm: float | None, ema_decay: float) -> None:
        """One step of the optimiser with this learning rate, then of the average (weights and batch statistics)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        target = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        average = [value for value in self.ema.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(average, target, 1 - ema_decay)

    def save(self, path: Path, identity: str) -> None:
        """Write everything the next step needs as one safetensors file, atomically; the file before it is kept.

        Args:
            path: The file.
            identity: What the training must agree on to resume from it.
        """
        arrays = {name: value.detach().cpu().numpy() for name, value in self._tensors().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{index}.{key}": value.cpu().numpy() for key, value in state.items()}
        if path.is_file():
            path.replace(_previous(path))
        counts = {"step": self.num_steps, "elapsed_s": self.elapsed_s, "recent": self.recent, "history": self.history}
        loss = None if math.isnan(self.loss) else self.loss
        checkpoint.save(path, arrays, {"identity": identity, "loss": loss, **counts})

    def restore(self, path: Path, identity: str, refuse_others: bool = False) -> bool:
        """Load the newest readable checkpoint at `path`.

        Args:
            path: The file of `save`.
            identity: Only a checkpoint of the same identity is loaded.
            refuse_others: Whether a checkpoint of another one is an error.

        Returns:
            Whether there was one; else the state is as it was.

        Raises:
            UserError: There are checkpoints but none is readable, or one belongs to another training.
        """
        found = _newest(path)
        if found is None:
            return False
        arrays, metadata = found
        if metadata.get("identity") != identity:
            if refuse_others:
                raise UserError(f"{path} was made with other settings: remove it or choose another --out")
            return False
        with torch.no_grad():
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
        self.num_steps = int(metadata["step"])
        # Checkpoints of earlier versions hold no losses; a segmenter's had its seconds among the weights.
        earlier_s = arrays["model.trained_s"].item() if "model.trained_s" in arrays else 0.0
        self.elapsed_s = float(metadata.get("elapsed_s", earlier_s))
        self.loss = math.nan if metadata.get("loss") is None else float(metadata["loss"])
        self.recent = list(metadata.get("recent", ()))
        self.history = [(int(num_steps), float(loss)) for num_steps, loss in metadata.get("history", ())]
        return True

    @staticmethod
    def remove(path: Path) -> None:
        """Remove the checkpoints of a training that has ended."""
        for file in (path, _previous(path)):
            file.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        """Both networks' tensors under one name each; they share memory with the networks."""
        both = (("model", self.model), ("ema", self.ema))
        return {f"{prefix}.{name}": value for prefix, net in both for name, value in net.state_dict().items()}


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW under which matrices and kernels decay, biases and normalisation do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True)


def _previous(path: Path) -> Path:
    """The checkpoint before the newest."""
    return path.with_name(path.name + ".previous")


def _newest(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """The newest readable checkpoint; None where there is none at all."""
    there = [file for file in (path, _previous(path)) if file.is_file()]
    for file in there:
        try:
            return checkpoint.load(file)
        except UserError:
            continue
    if there:
        raise UserError(f"{path} and the checkpoint before it cannot be read: remove them to train from the start")
    return None
