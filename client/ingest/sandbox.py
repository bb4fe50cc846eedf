"""Untrusted files are parsed in child processes, within limits of memory and time.

    with Workers(num_processes=2) as workers:
        for result in workers.map(read_file, paths, batch_size=64):      # in the order of the items
            if isinstance(result, Unusable): ...                         # its code
        for number, result in workers.as_finished(prepare_one, studies):  # the item's number, from 0

Whatever a file makes of its child, the parent continues: an item whose child dies gets the code "parser-crashed", one
that takes longer than `seconds` "too-slow", one that needs more than `memory_bytes` "too-large"; `Unusable` keeps its
own code, and any other exception becomes "unexpected-error". A new child takes the place of a dead one.

Children come from a fork server: one process that never opens a scan, imports what the children need once, and has
none of the parent's threads, memory or open files. It ends with the parent, however that ends, and takes the children
along. Children have no output: what C libraries and pydicom print may quote a patient.

Guarantees: a file can spend `memory_bytes` and `seconds`, and leaves no core dump. Not covered: a decoder that a
crafted file takes over acts with this account's rights, so run `prepare` under one that may do no more than it needs.
The memory limit needs Linux; elsewhere there is only the time limit.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from fedcmr.client.ingest.fork_server import send_message
from fedcmr.client.ingest.reasons import Unusable

MEMORY_BYTES = 4 * 2**30
"""Above what a child has at start: the largest stack that is taken, and what finding the heart in it needs."""
SECONDS = 120.0
"""For one item: a study on a slow network disk takes a tenth of it."""
MAX_WAITING = 64
"""Finished batches per child that wait for a slower one before them; then the other children wait as well."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Child processes that call a function for many items."""

    def __init__(self, num_processes: int = 1, memory_bytes: int = MEMORY_BYTES, seconds: float = SECONDS) -> None:
        if num_processes < 1 or memory_bytes < 1 or not seconds > 0:
            raise ValueError(
                f"Expected at least one process, byte and second, got {num_processes=} {memory_bytes=} {seconds=}."
            )
        self.num_processes, self.memory_bytes, self.seconds = num_processes, memory_bytes, seconds
        self._idle: list[_Child] = []

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        batch_size: int = 1,
    ) -> Iterator[Result | Unusable]:
        """What `function` returns for each item, or why there is nothing, in the order of the items.

        Args:
            function: Pickles, as do its items and results. Must be free to run twice for an item where `batch_size`
                is above 1: items that shared a batch with a deadly one are given out again, one by one.
            items: Consumed as the children get on.
            batch_size: Items per message; more cost less where an item takes a millisecond.

        Raises:
            OSError: The function met one, for example a full disk: number and text as there, without the file.
        """
        return _Job(self, pickle.dumps(function), _module_of(function), _batches(items, batch_size)).in_order()

    def as_finished(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Unusable]]:
        """The number of each item, from 0, and what `map` would return for it, as the children finish them."""
        job = _Job(self, pickle.dumps(function), _module_of(function), _batches(items, 1))
        return ((number, results[0]) for number, results in job.as_finished())

    def close(self) -> None:
        """End the children."""
        _fork_server.end(self._idle)
        self._idle = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class _Child:
    """A child process as the parent sees it."""

    number: int
    connection: Connection


@dataclass(eq=False)
class _Batch:
    """Items that travel together, the place of their results, and when they were sent."""

    place: tuple[int, ...]
    items: list[Any]
    sent_at: float = 0.0


class _Job:
    """One call of `map`."""

    def __init__(self, workers: Workers, function: bytes, module: str, batches: Iterator[_Batch]) -> None:
        self.workers, self.function, self.module = workers, function, module
        self.batches = batches
        self.again: deque[_Batch] = deque()
        self.busy: dict[Connection, tuple[_Child, _Batch]] = {}
        self.finished: dict[int, list[Any]] = {}
        """Results by the batch's number, for those that came before their turn."""
        self.parts: dict[int, dict[int, Any]] = {}
        """Results of a batch whose items were given out again, by their place in it."""

    def in_order(self) -> Iterator[Any]:
        turn = 0
        for number, results in self.as_finished():
            self.finished[number] = results
            while turn in self.finished:
                yield from self.finished.pop(turn)
                turn += 1

    def as_finished(self) -> Iterator[tuple[int, list[Any]]]:
        """Batches by their number."""
        try:
            while self._send() or self.busy:
                yield from self._receive()
        finally:
            # After an interruption children are still at work: they are ended, not waited for.
            _fork_server.end([child for child, _ in self.busy.values()])

    def _send(self) -> bool:
        """Give every idle child a batch; whether there was any."""
        sent = False
        while len(self.busy) < self.workers.num_processes:
            if len(self.finished) > MAX_WAITING * self.workers.num_processes and not self.again:
                break
            batch = self.again.popleft() if self.again else next(self.batches, None)
            if batch is None:
                break
            self._start(batch)
            sent = True
        return sent

    def _start(self, batch: _Batch) -> None:
        """Send a batch to an idle child, or to a new one."""
        message = pickle.dumps((self.function, self.workers.seconds, batch.items))
        while True:
            child = self.workers._idle.pop() if self.workers._idle else self._new_child()
            try:
                child.connection.send_bytes(message)
                break
            except OSError:  # it died while it was idle
                _fork_server.end([child])
        batch.sent_at = time.monotonic()
        self.busy[child.connection] = child, batch

    def _new_child(self) -> _Child:
        return _fork_server.start(self.workers.memory_bytes, self.module)

    def _receive(self) -> Iterator[tuple[int, list[Any]]]:
        """Wait for the children; batches that are complete, as (number, results)."""
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            child, batch = self.busy.pop(connection)
            try:
                outcomes = pickle.loads(connection.recv_bytes())
                self.workers._idle.append(child)
            except (EOFError, OSError, pickle.UnpicklingError):
                _fork_server.end([child])
                if len(batch.items) > 1:
                    number = batch.place[0]
                    self.parts[number] = {}
                    self.again += [_Batch((number, i, len(batch.items)), [item]) for i, item in enumerate(batch.items)]
                    continue
                slow = time.monotonic() - batch.sent_at >= self.workers.seconds
                outcomes = [("unusable", "too-slow" if slow else "parser-crashed")]
            results = [_result(kind, value) for kind, value in outcomes]
            if len(batch.place) == 1:
                yield batch.place[0], results
                continue
            number, i, total = batch.place
            self.parts[number][i] = results[0]
            if len(self.parts[number]) == total:
                parts = self.parts.pop(number)
                yield number, [parts[i] for i in range(total)]


def _result(kind: str, value: Any) -> Any:
    """A child's outcome as `map` gives it to its caller."""
    if kind == "unusable":
        return Unusable(value)
    if kind == "os-error":
        raise OSError(*value)
    return value


def _batches(items: Iterable[Any], size: int) -> Iterator[_Batch]:
    """Items in groups of `size`, numbered from 0."""
    iterator, number = iter(items), 0
    while batch := list(islice(iterator, size)):
        yield _Batch((number,), batch)
        number += 1


def _module_of(function: Any) -> str:
    """Where a function, or that of a `functools.partial`, comes from: the fork server imports it before it forks."""
    return str(getattr(function, "func", function).__module__)


class _ForkServer:
    """The process that children are forked from; one for all `Workers`, started at first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.num_started = 0

    def start(self, memory_bytes: int, module: str) -> _Child:
        """A new child."""
        with self.lock:
            self.num_started += 1
            ours, its = socket.socketpair()
            order = ("start", self.num_started, memory_bytes, module, str(Path.cwd()), sys.path)
            try:
                self._control()
                send_message(self.control, order, its)
            except OSError:  # somebody has ended the fork server
                self.process = None
                self._control()
                send_message(self.control, order, its)
            its.close()
            return _Child(self.num_started, Connection(ours.detach()))

    def end(self, children: list[_Child]) -> None:
        """End children, whatever they are at."""
        with self.lock:
            for child in children:
                child.connection.close()
            if children and self.process is not None and self.owner == os.getpid():
                try:
                    send_message(self.control, ("end", [child.number for child in children]))
                except OSError:
                    self.process = None

    def _control(self) -> None:
        """Have a fork server that listens."""
        if self.process is not None and self.owner == os.getpid():
            return
        self.control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A session of its own, for the terminal's Ctrl-C is the parent's to answer; one thread, for there is one
        # child per core, and the address space of idle threads counts against the limit.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}\n"
                f"from fedcmr.client.ingest.fork_server import serve; serve({its.fileno()})",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            start_new_session=True,
            env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        )
        its.close()
        self.owner = os.getpid()

    def close(self) -> None:
        """End the fork server and its children."""
        with self.lock:
            if self.process is not None and self.owner == os.getpid():
                self.control.close()
                self.process.wait()
            self.process = None


_fork_server = _ForkServer()
atexit.register(_fork_server.close)
