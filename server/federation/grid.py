"""Flower's grid, asked for replies often: its own `send_and_receive` asks every three seconds.

With rounds of seconds these are much of a round. The ServerApp and the SuperLink are on one machine, so a question
costs little.
"""

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

POLL_S = 0.25


class PromptGrid(Grid):
    """A grid whose `send_and_receive` asks every `POLL_S`; all else is the given grid's.

    Args:
        grid: One that answers where it sends, and so has no `push_messages`, is left to do so.
    """

    def __init__(self, grid: Grid):
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower itself prefers the `Message` constructor."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """The connected nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, and wait for their replies or `timeout` seconds."""
        messages = list(messages)
        try:
            waiting = set(self._grid.push_messages(messages))
        except NotImplementedError:
            return self._grid.send_and_receive(messages, timeout=timeout)
        started = time.monotonic()
        replies: list[Message] = []
        while waiting and (timeout is None or time.monotonic() - started < timeout):
            found = list(self._grid.pull_messages(waiting))
            replies += found
            waiting -= {message.metadata.reply_to_message_id for message in found}
            if waiting:
                time.sleep(POLL_S)
        return replies
