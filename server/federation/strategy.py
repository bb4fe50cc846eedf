"""The edge to Flower: which nodes are connected, a request as messages to them, and what came back.

A round itself is in `fedcmr.server.federation.round`, which does not depend on Flower.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedcmr.server.federation.round import Replies
from fedcmr.server.federation.senders import Nodes, Reply, reply_of
from fedcmr.server.federation.state import quorum
from fedcmr.server.settings import FederationConfig
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Release
from fedcmr.shared.progress import console
from fedcmr.shared.records import (
    ARRAYS,
    EvaluationRequest,
    Request,
    pack_rehearsal,
    pack_rehearsed_evaluation,
    pack_request,
)

NO_ANSWER = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Flower's error codes in place of a site that did not reply in time; such a site counts as silent."""
NODE_POLL_S = 1.0
NODE_WAIT_S = 120.0
"""Seconds that a round waits for further sites to connect once one has."""


class SitesByFlower:
    """The sites of a study, as Flower reaches them.

    Args:
        grid: Flower's connection to the sites.
        settings: Quorum and timeout.
        num_sites: Number of sites in the study.
        nodes: What `read_nodes` returned.
    """

    def __init__(self, grid: Grid, settings: FederationConfig, num_sites: int, nodes: Nodes | None):
        self.grid, self.settings, self.num_sites, self.nodes = grid, settings, num_sites, nodes

    def wait(self, num_wanted: int, num_needed: int) -> list[int]:
        """`wait_for_nodes`, with the study's own timeout."""
        return wait_for_nodes(self.grid, num_wanted, num_needed, self.settings.reply_timeout_s, self.nodes)

    def train(self, request: Request, arrays: Arrays) -> Replies:
        """Send a round's request to every connected site; a request fetched after the timeout costs no privacy.

        Raises:
            UserError: Fewer sites than the quorum are connected: their replies would be charged for nothing.
        """
        messages = self.messages(request, arrays)
        received_messages = list(self.grid.send_and_receive(messages, timeout=self.settings.reply_timeout_s))
        return Replies(
            num_requested=len(messages),
            replies=received(received_messages, self.nodes),
            bytes_down=sum(_num_bytes(message.content) for message in messages),
            bytes_up=sum(_num_bytes(message.content) for message in received_messages if message.has_content()),
        )

    def messages(self, request: Request, arrays: Arrays) -> list[Message]:
        """A round's request as one message for every connected site.

        Raises:
            UserError: Fewer sites than the quorum are connected.
        """
        needed = quorum(self.settings, self.num_sites, request.task)
        node_ids = self.wait(needed, needed)
        content = pack_request(arrays, request)
        return _messages(content, MessageType.TRAIN, node_ids, self.settings.reply_timeout_s, f"{request.server_round}")

    def evaluate(self, request: EvaluationRequest, arrays: Arrays) -> list[Reply]:
        """Send a model to every site that is connected, after a short wait for all; returns what came back in time."""
        node_ids = self.wait(self.num_sites, 0)
        return self._send(pack_request(arrays, request), MessageType.EVALUATE, node_ids, "evaluation")

    def rehearse(
        self, request: Request, arrays: Arrays, planned: Sequence[Release], node_ids: Iterable[int]
    ) -> list[Reply]:
        """Let these sites rehearse a request; returns what came back in time.

        It travels as a query: a client without rehearsals cannot mistake it for a round.
        """
        return self._send(pack_rehearsal(arrays, request, planned), MessageType.QUERY, node_ids, "rehearsal")

    def rehearse_evaluation(self, request: EvaluationRequest, arrays: Arrays, node_ids: Iterable[int]) -> list[Reply]:
        """`rehearse` for the evaluation of a model at the sites."""
        return self._send(pack_rehearsed_evaluation(arrays, request), MessageType.QUERY, node_ids, "rehearsal")

    def _send(self, content: RecordDict, message_type: str, node_ids: Iterable[int], group: str) -> list[Reply]:
        timeout_s = self.settings.reply_timeout_s
        messages = _messages(content, message_type, node_ids, timeout_s, group)
        return received(self.grid.send_and_receive(messages, timeout=timeout_s), self.nodes)


def received(messages: Iterable[Message], nodes: Nodes | None) -> list[Reply]:
    """The messages that came back, each with its sender, without the sites that did not reply."""
    return [
        reply_of(message.metadata.src_node_id, message.content, "", nodes)
        if message.has_content()
        else reply_of(message.metadata.src_node_id, None, message.error.reason or "", nodes)
        for message in messages
        if message.has_content() or message.error.code not in NO_ANSWER
    ]


def wait_for_nodes(
    grid: Grid, num_wanted: int, num_needed: int, timeout_s: float, nodes: Nodes | None = None
) -> list[int]:
    """The connected nodes of the study: at least `num_wanted`, or after `NODE_WAIT_S` at least `num_needed`.

    Args:
        grid: Flower's connection to the sites.
        num_wanted: Number of nodes worth a short wait.
        num_needed: Number of nodes without which the study stops; at most `num_wanted`.
        timeout_s: Seconds to wait for `num_needed` nodes.
        nodes: Nodes of the study: the reply of any other would be charged and dropped. None where there is no list.

    Raises:
        UserError: Fewer than `num_needed` connected within `timeout_s`.
    """
    started, reported = time.monotonic(), -1
    while len(node_ids := sorted(n for n in grid.get_node_ids() if nodes is None or n in nodes)) < num_wanted:
        waited = time.monotonic() - started
        if len(node_ids) >= num_needed and waited > NODE_WAIT_S:
            break
        if waited > timeout_s and len(node_ids) < num_needed:
            there = f"{len(node_ids)} of the {num_needed} sites it takes" if node_ids else "no site"
            raise UserError(f"{there} connected within {timeout_s:.0f} s: start the sites, then the same command again")
        if len(node_ids) != reported:
            reported = len(node_ids)
            console.print(f"waiting for sites: {reported} of {num_wanted} connected")
        time.sleep(NODE_POLL_S)
    return node_ids


def _messages(
    content: RecordDict, message_type: str, node_ids: Iterable[int], timeout_s: float, group: str
) -> list[Message]:
    """The same content for every node; it expires with the timeout."""
    return [
        Message(content, dst_node_id=node_id, message_type=message_type, ttl=timeout_s, group_id=group)
        for node_id in node_ids
    ]


def _num_bytes(content: Any) -> int:
    """Bytes of the arrays in a message's content."""
    record = content.get(ARRAYS)
    return sum(len(array.data) for array in record.values()) if isinstance(record, ArrayRecord) else 0
