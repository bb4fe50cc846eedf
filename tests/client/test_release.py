"""Private work under a charge: once, by one process, and with an outcome that stays."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from fedcmr.client.ledger import Ledger
from fedcmr.client.release import Refused, charged
from fedcmr.shared.privacy import Mechanism, Release
from tests.client.ledger_rounds import DELTA, RELEASE

ROOT = Path(__file__).resolve().parents[2]
KEY = ("ab" * 4, 2)


def ask(folder, work, key=KEY, release=RELEASE, cap=100.0):
    mechanism = Mechanism(**asdict(release), max_grad_norm=1.0, target_delta=DELTA)
    return charged(Ledger(folder), key, mechanism, work, cap=cap)


def test_work_is_done_once_and_its_reply_is_kept(folder):
    replies = iter([b"first", b"second"])
    assert [ask(folder, lambda: next(replies)) for _ in range(3)] == [b"first"] * 3
    assert Ledger(folder).releases() == [RELEASE]


@pytest.mark.parametrize("error", [MemoryError("patient-4711"), RuntimeError("x"), OSError(28, "No space left")])
def test_whatever_goes_wrong_under_a_charge_is_one_answer_for_ever(folder, error):
    calls = []

    def work():
        calls.append(1)
        raise error

    for _ in range(3):
        with pytest.raises(Refused) as caught:
            ask(folder, work)
        assert str(caught.value) == "internal-error"
    assert len(calls) == 1, "a failure is not drawn again"
    with pytest.raises(Refused, match="internal-error"):
        ask(folder, lambda: b"would have worked now")
    assert [charge["failure"] for charge in Ledger(folder).charges()] == ["internal-error"]
    assert ask(folder, lambda: b"another", key=(KEY[0], 3)) == b"another"


def test_a_reply_that_cannot_be_kept_does_not_leave_and_is_not_made_again(folder, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", broken)
        with pytest.raises(Refused, match="internal-error"):
            ask(folder, lambda: b"update")
    with pytest.raises(Refused, match="internal-error"):
        ask(folder, lambda: b"update")
    assert Ledger(folder).releases() == [RELEASE]


def test_what_is_refused_before_the_charge_says_why_and_may_be_asked_again(folder):
    for _ in range(2):
        with pytest.raises(Refused, match="budget-exhausted"):
            ask(folder, pytest.fail, cap=1e-3)
    assert Ledger(folder).charges() == []
    assert ask(folder, lambda: b"update") == b"update"


WORKER = """
import fcntl, sys, time
from pathlib import Path
from fedcmr.client.ledger import Ledger
from fedcmr.client.release import charged
from fedcmr.shared.privacy import Mechanism

folder, name = Path(sys.argv[1]), sys.argv[2]

flock = fcntl.flock

def asking(*lock):
    (folder.parent / f"{name}.asked").touch()
    flock(*lock)

def work():
    (folder.parent / f"{name}.works").touch()
    while len(list(folder.parent.glob("*.asked"))) < 2:  # the other one is at the lock
        time.sleep(0.01)
    return name.encode()

fcntl.flock = asking
print("ready", flush=True)
sys.stdin.readline()
mechanism = Mechanism(2.0, 1.0, 2, max_grad_norm=1.0, target_delta=1e-3)
print(charged(Ledger(folder), ("abababab", 2), mechanism, work, cap=100.0).decode())
"""


def test_a_second_process_with_the_same_request_waits_for_the_first_and_sends_its_reply(folder):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    replies = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert replies[0] == replies[1] in ("one", "two")
    assert [path.name for path in folder.parent.glob("*.works")] == [f"{replies[0]}.works"]
    assert Ledger(folder).releases() == [RELEASE]


def test_the_lock_is_free_again_after_a_failure(folder):
    with pytest.raises(Refused):
        ask(folder, lambda: 1 / 0)
    assert ask(folder, lambda: b"update", release=Release(3.0, 1.0, 1)) == b"update"
