"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedcmr.shared.console import plain_console

T = TypeVar("T")

LOG_INTERVAL_S = 15.0
console = plain_console(stderr=True)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `items`, showing how far the work has come.

    Args:
        items: What to iterate over.
        description: A few words, for example "sampling hearts".
        total: Number of items, where `len(items)` is not known.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
        return
    last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        # What is finished needs no line: an import prepares studies one by one, each "1 of 1".
        if time.monotonic() - last > LOG_INTERVAL_S and done != total:
            last = time.monotonic()
            print(f"{description}: {done}" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)


def track_parts(total: int, size: int, description: str | None) -> Iterator[slice]:
    """Yield slices that cover `total` items, `size` at a time, and show how many items are done, not how many slices.

    Args:
        total: Number of items.
        size: Items of a slice; the last one may have fewer.
        description: As for `track`; None shows nothing.
    """
    parts = (slice(start, min(start + size, total)) for start in range(0, total, size))
    if description is None:
        yield from parts
        return
    with show_share(description) as tell:
        for part in parts:
            tell(part.start / total, f"{part.start} of {total}")
            yield part


@contextmanager
def show_share(description: str) -> Iterator[Callable[[float, str], None]]:
    """Show how far work has come whose end is not a number of items, such as a training by the clock.

    Yields:
        Takes the share that is done, in [0, 1], and some words on it, for example "step 40 of 600".
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def print_now_and_then(share: float, text: str) -> None:
            nonlocal last
            if time.monotonic() - last > LOG_INTERVAL_S:
                last = time.monotonic()
                print(f"{description}: {100 * share:.0f} %, {text}", file=sys.stderr, flush=True)

        yield print_now_and_then
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task: TaskID | None = None

        def move(share: float, text: str) -> None:
            nonlocal task
            if task is None:  # what an earlier call has done is there from the start, and no speed is computed from it
                task = progress.add_task(description, total=1.0, completed=share, text=text)  # type: ignore[arg-type]
            progress.update(task, completed=share, text=text)

        yield move
