"""Replies are asked for often, until they are there or the time is over."""

import time

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcmr.server.federation import grid as module
from fedcmr.server.federation.grid import PromptGrid


class SlowSites:
    """A grid whose node N replies at the Nth question; node 9 never does."""

    def __init__(self):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.asked = []
        self.sent = {}

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
            self.sent[message.metadata.message_id] = message
        return list(self.sent)

    def pull_messages(self, message_ids):
        self.asked.append(set(message_ids))
        ready = [name for name in message_ids if int(name[1:]) <= len(self.asked) and name != "m9"]
        return [Message(RecordDict(), reply_to=self.sent[name]) for name in ready]


class AnswersAtOnce:
    """A grid that answers where it sends, as the one in this process tree."""

    def push_messages(self, messages):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        return [(message, timeout) for message in messages]


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.setattr(module, "POLL_S", 0.01)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return lambda *nodes: (Message(RecordDict(), dst_node_id=node, message_type="train") for node in nodes)


def test_every_reply_is_taken_once_and_the_last_one_ends_the_wait(questions):
    sites = SlowSites()
    replies = PromptGrid(sites).send_and_receive(questions(2, 3), timeout=60)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3]
    assert sites.asked == [{"m2", "m3"}, {"m2", "m3"}, {"m3"}]


def test_who_is_late_is_missing_from_the_replies(questions):
    started = time.monotonic()
    replies = PromptGrid(SlowSites()).send_and_receive(questions(1, 9), timeout=0.2)
    assert [reply.metadata.src_node_id for reply in replies] == [1]
    assert 0.2 <= time.monotonic() - started < 10


def test_a_grid_that_answers_where_it_sends_is_left_to_do_so(questions):
    replies = PromptGrid(AnswersAtOnce()).send_and_receive(questions(2, 3), timeout=5)
    assert [(message.metadata.dst_node_id, timeout) for message, timeout in replies] == [(2, 5), (3, 5)]
