"""Where the arithmetic runs, on how many cores, and in which precision."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fedcmr.shared.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA when it is there.

    Raises:
        UserError: CUDA was requested and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device is there: use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where the processor multiplies it natively; elsewhere it would be slower than float32.

    With channels_last, training the generator was measured twice as fast as in float32 on two AVX512-BF16 cores;
    `fedcmr.simulations.benchmarks.training` measures what the ResNet50 gains.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def one_core_each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` of work that torch does on the CPU: as many items at once as torch may use cores, each on one of them.

    An item's result does not depend on how many others there are, not even in its last digit, because it is always
    computed on one core. For small batches it is faster too: most layers are too small to be shared out.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(num_threads, initializer=_alone)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # what the pool's threads have set would hold for later threads too


def _alone() -> None:
    """What a thread needs that works next to others: one core, and no cache of casts shared with them."""
    torch.set_num_threads(1)
    torch.set_autocast_cache_enabled(False)
