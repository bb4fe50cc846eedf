"""Where the arithmetic runs, and in which precision."""

import torch

from shared.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when it is there.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is there: use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the processor multiplies it natively; elsewhere it would be slower than float32.

    With channels_last, training the generator was measured twice as fast as in float32 on two AVX512-BF16 cores; what
    the ResNet50 gains, `simulations.benchmarks.training` tells.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)
