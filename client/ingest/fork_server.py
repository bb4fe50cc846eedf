"""The process that forks `sandbox.Workers`' children, and the children themselves."""

import importlib
import logging
import os
import pickle
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedcmr.client.ingest.reasons import Unusable

MAX_MESSAGE_BYTES = 2**16


def send_message(control: socket.socket, order: tuple[Any, ...], passed: socket.socket | None = None) -> None:
    """Send the fork server an order, with a socket for the child it is about."""
    message = pickle.dumps(order)
    assert len(message) <= MAX_MESSAGE_BYTES
    socket.send_fds(control, [message], [] if passed is None else [passed.fileno()])


def serve(descriptor: int) -> None:
    """The fork server: start and end children as the parent requests, until the parent is gone.

    Args:
        descriptor: File descriptor of the socket that orders come from.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    children: dict[int, int] = {}
    with socket.socket(fileno=descriptor) as control:
        while True:
            message, descriptors, *_ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
            _reap(children)
            if not message:
                break
            kind, *order = pickle.loads(message)
            if kind == "end":
                _kill(children, order[0])
                continue
            number, memory_bytes, module, folder, path = order
            sys.path[:] = path
            with suppress(Exception):  # the child meets it again, and can say so
                importlib.import_module(module)
            process = os.fork()
            if process == 0:
                control.close()
                _work(Connection(descriptors[0]), memory_bytes, folder)
            os.close(descriptors[0])
            children[number] = process
    _kill(children, list(children))


def _reap(children: dict[int, int]) -> None:
    """Forget children that are gone: their process numbers may belong to others soon."""
    for number, process in list(children.items()):
        if os.waitpid(process, os.WNOHANG)[0]:
            del children[number]


def _kill(children: dict[int, int], numbers: list[int]) -> None:
    """End children; those that are not reaped yet keep their process numbers."""
    for number in numbers:
        if number in children:
            os.kill(children[number], signal.SIGKILL)
            os.waitpid(children.pop(number), 0)


def _work(connection: Connection, memory_bytes: int, folder: str) -> None:
    """A child: answer batches until the parent hangs up."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        with suppress(OSError):
            os.chdir(folder)
        _limit_memory(memory_bytes)
        while True:
            function, seconds, items = pickle.loads(connection.recv_bytes())
            call = pickle.loads(function)
            outcomes = [_outcome(call, item, seconds) for item in items]
            connection.send_bytes(pickle.dumps(outcomes, pickle.HIGHEST_PROTOCOL))
    except BaseException:  # noqa: S110 - the parent hung up, or sees the end of this child as a crash
        pass
    finally:
        os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    """Cap the address space at what is there now and `memory_bytes`."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        present = int(statistics.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limit = present + memory_bytes
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)


def _outcome(function: Callable[[Any], Any], item: Any, seconds: float) -> tuple[str, Any]:
    """A result, a code, or the number and text of an operating system's error."""
    # The kernel ends a process that does not handle SIGALRM, also in the midst of a decoder's C code.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return "result", function(item)
    except Unusable as unusable:
        return "unusable", unusable.code
    except MemoryError:
        return "unusable", "too-large"
    except OSError as error:
        return "os-error", (error.errno, error.strerror)
    except Exception:
        return "unusable", "unexpected-error"  # its own words may quote a patient
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
