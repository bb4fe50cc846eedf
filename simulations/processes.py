"""Worker processes that do not run the program that started them again.

`multiprocessing` lets its workers import the main module. Where that is a script without `if __name__ == "__main__"`,
each worker would start the whole study once more, and workers of its own. A worker of this module runs `serve` alone
and receives by name what to call, whoever its parent is: a command, a script, a notebook or `python -c`.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Worker:
    """A process that does one call at a time.

    Attributes:
        process: The process.
        connection: Takes a function with its arguments, and gives what it returned; `EOFError` and `ConnectionError`
            say that the process has ended.
    """

    process: "subprocess.Popen[bytes]"
    connection: Connection

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call; `connection` has the result later. The function is one of a module, not of a script."""
        self.connection.send((function, arguments))

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Kill the process, whatever it is at."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def start_worker() -> Worker:
    """Start a worker: it ends with this process, however that ends.

    Its session is its own, so that a terminal's Ctrl-C is for this process alone to handle.
    """
    ours, its = socket.socketpair()
    number = its.fileno()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}\nfrom {__name__} import serve; serve({number})",
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=[number],
        start_new_session=True,
    )
    its.close()
    return Worker(process, Connection(ours.detach()))


@contextlib.contextmanager
def workers(num_processes: int) -> Iterator[list[Worker]]:
    """So many workers, which are ended afterwards, whatever they are at."""
    started: list[Worker] = []
    try:
        for _ in range(num_processes):
            started.append(start_worker())
        yield started
    finally:
        for worker in started:
            worker.stop()


def map_unordered(
    idle: Sequence[Worker], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """What a function returns for each item, as the results come.

    Raises:
        OSError: The function raised it in a worker, for example because the disk is full.
        RuntimeError: A worker has ended; its traceback stands on the standard error output.
    """
    free, busy = list(idle), list[Worker]()
    waiting = deque(items)
    while waiting or busy:
        while free and waiting:
            busy.append(free.pop())
            busy[-1].call(_result_or_os_error, function, waiting.popleft())
        ready = wait([worker.connection for worker in busy])
        for worker in [worker for worker in busy if worker.connection in ready]:
            try:
                result = worker.connection.recv()
            except (EOFError, ConnectionError):
                raise RuntimeError("A worker process has ended before its work was done.") from None
            if isinstance(result, OSError):
                raise result
            busy.remove(worker)
            free.append(worker)
            yield result


def serve(descriptor: int) -> None:
    """The life of a worker: call what is requested until the parent hangs up or is gone.

    Args:
        descriptor: File descriptor of the socket that leads to the parent.
    """
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            connection.send(function(*arguments))


def _end_with_parent(descriptor: int) -> None:
    """Leave at once, also in the middle of a computation, when the parent hangs up or is gone."""
    poll = select.poll()
    poll.register(descriptor, 0)  # an end of the other side is reported unrequested
    poll.poll()
    os._exit(1)


def _result_or_os_error(function: Callable[[Item], Result], item: Item) -> Result | OSError:
    """What the function returns, or the error of a disk, which the parent knows how to explain."""
    try:
        return function(item)
    except OSError as error:
        return error
