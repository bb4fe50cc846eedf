"""In-process grid: Flower's Message API without ports and without Ray.

The real ClientApp answers for each site, in worker processes or, with one process, in this one. Every task
runs on one thread, so that results do not depend on the number of processes.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Self

import torch
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedcmr.client.app import app as client_app
from fedcmr.server.run_folder import RunFolder
from fedcmr.shared.progress import console, track
from fedcmr.simulations.processes import Worker, start_worker

RUN_ID = 1
FIRST_NODE_ID = SUPERLINK_NODE_ID + 1


class InProcessGrid(Grid):
    """A grid whose nodes are contexts in this process tree.

    Use it as a context manager: no worker outlives it, also after an interruption. Work that sites have begun is
    finished before that, because it is charged and could not be done again; a second interruption ends it at once.

    Args:
        node_configs: One node's settings per site, as `flower-supernode --node-config` would give them.
        num_processes: Worker processes; 1 answers in this process.
    """

    def __init__(self, node_configs: list[UserConfig], num_processes: int):
        self._contexts = {
            node_id: Context(RUN_ID, node_id, node_config, RecordDict(), run_config={})
            for node_id, node_config in enumerate(node_configs, start=FIRST_NODE_ID)
        }
        self._num_workers = min(num_processes, len(node_configs)) if num_processes > 1 else 0
        self._workers: list[Worker] = []
        self._busy: list[Worker] = []
        self._num_messages = 0
        self._run = Run.create_empty(RUN_ID)
        # What a Flower runtime sets before it calls a ServerApp: without it no message can be made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK_NODE_ID

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is KeyboardInterrupt and self._busy:
                self._let_finish()
        finally:
            self.close()

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return replace(self._run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower itself prefers the `Message` constructor."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """One node per site, always connected."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: a message is answered where it is sent, by `send_and_receive`."""
        raise NotImplementedError("InProcessGrid answers in send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered, see `push_messages`."""
        raise NotImplementedError("InProcessGrid answers in send_and_receive")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Let every node answer its message; one that dies or is late is missing from the replies."""
        queue = deque(messages)
        for message in queue:
            self._num_messages += 1
            message.metadata.__dict__["_message_id"] = str(self._num_messages)
        if not queue:
            return []
        description = f"round {queue[0].metadata.group_id}: sites that have answered"
        answers = self._answer_in_workers(queue, timeout) if self._num_workers else self._answer_here(queue)
        return list(track(answers, description, total=len(queue)))

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        self._busy.clear()

    def _let_finish(self) -> None:
        """Wait for what workers are at: their sites' ledgers keep the replies, for the same command to resume with."""
        console.print("interrupted: the sites finish what they have charged; again ends them at once", highlight=False)
        for worker in self._busy:
            with contextlib.suppress(EOFError, ConnectionError):
                worker.connection.recv()

    def _answer_here(self, queue: deque[Message]) -> Iterator[Message]:
        """Answer one after the other, in this process; an interruption waits until the site has finished."""
        while queue:
            message = queue.popleft()
            with _interrupts_deferred():
                reply = _answer(message, self._contexts[message.metadata.dst_node_id])
            yield reply

    def _answer_in_workers(self, queue: deque[Message], timeout: float | None) -> Iterator[Message]:
        """Keep every worker busy until all have answered, died or run out of time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        busy = self._busy
        while queue or busy:
            while queue and len(busy) < self._num_workers:
                worker = self._idle_worker()
                message = queue.popleft()
                busy.append(worker)
                worker.call(_answer, message, self._contexts[message.metadata.dst_node_id])
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                for worker in busy:
                    self._drop(worker)
                busy.clear()
                return
            ready = wait([worker.connection for worker in busy], remaining)
            for worker in [worker for worker in busy if worker.connection in ready]:
                busy.remove(worker)
                try:
                    reply = worker.connection.recv()
                except (EOFError, ConnectionError):  # it died
                    self._drop(worker)
                    continue
                yield reply

    def _idle_worker(self) -> Worker:
        """A worker that is not busy, started where there is none."""
        for worker in self._workers:
            if worker not in self._busy and worker.is_alive():
                return worker
        self._workers.append(start_worker())
        return self._workers[-1]

    def _drop(self, worker: Worker) -> None:
        """End a worker that is late or dead; the next message gets a new one."""
        worker.stop()
        self._workers.remove(worker)


def make_grid(run: RunFolder) -> InProcessGrid:
    """The grid of a run folder's sites."""
    names = run.site_names()
    node_configs: list[UserConfig] = [
        {"site": str(run.path.resolve() / "sites" / name), "device": run.config.device} for name in names
    ]
    return InProcessGrid(node_configs, run.config.federation.num_processes)


def run_server_app(grid: Grid, run_config: UserConfig) -> None:
    """Run the real ServerApp on a grid, with the settings that `flwr run --run-config` would give it."""
    from fedcmr.server.app import app as server_app  # here: workers import this module and need no server

    server_app(grid, Context(RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), run_config))


def _answer(message: Message, context: Context) -> Message:
    """Call the ClientApp on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return client_app(message, context)
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of what is done in here; a second one does not."""
    waiting: list[int] = []
    signs = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {sign: signal.getsignal(sign) for sign in signs}

    def note(sign: int, _frame: FrameType | None) -> None:
        waiting.append(sign)
        for other, handler in previous.items():
            signal.signal(other, handler)

    for sign in signs:
        signal.signal(sign, note)
    try:
        yield
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
    for number in waiting:
        signal.raise_signal(number)
