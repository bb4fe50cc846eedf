import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger import HEAD_NAME, LEDGER_NAME, REPLIES_NAME, BudgetExhausted, Ledger, LedgerError
from shared.privacy import Release, epsilon

DELTA = 1e-3
RELEASE = Release(2.0, 1.0, 2)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "site" / "ledger"


@pytest.fixture
def used(folder) -> Path:
    """The folder of a ledger with two rounds charged, the first of them committed."""
    ledger = Ledger(folder)
    ledger.reserve("run", 1, RELEASE, DELTA, 100)
    ledger.commit("run", 1, b"update")
    ledger.reserve("run", 2, RELEASE, DELTA, 100)
    return folder


def charge(folder: Path, server_round: int, release: Release = RELEASE, cap: float = 100) -> None:
    """One whole round, as a client goes through it."""
    ledger = Ledger(folder)
    ledger.reserve("run", server_round, release, DELTA, cap)
    ledger.commit("run", server_round, b"update of round %d" % server_round)


# What is spent


def test_a_new_ledger_has_spent_nothing(folder):
    assert Ledger(folder).releases() == []
    assert Ledger(folder).spent(DELTA) == 0
    assert Ledger(folder).cached_reply("run", 1) is None


def test_spending_adds_up_over_rounds_runs_and_restarts_and_never_falls(folder):
    releases = [Release(5.0, 1.0, 1), Release(4.0, 1.0, 2), Release(4.0, 0.5, 3), Release(20.0, 1.0, 1)]
    spent = [0.0]
    for server_round, release in enumerate(releases, start=1):
        ledger = Ledger(folder)
        ledger.reserve(f"run {server_round % 2}", server_round, release, DELTA, 100)
        spent.append(Ledger(folder).spent(DELTA))
    assert Ledger(folder).releases() == releases
    assert spent == sorted(spent)
    assert spent[-1] == epsilon(releases, DELTA)[0]


def test_the_cap_is_never_exceeded_and_a_refusal_costs_nothing(folder):
    cap = 4.0
    for server_round in range(1, 20):
        before = Ledger(folder).spent(DELTA)
        try:
            charge(folder, server_round, cap=cap)
        except BudgetExhausted as error:
            assert error.code == "budget-exhausted"
            assert Ledger(folder).spent(DELTA) == before
            break
    else:
        pytest.fail("the budget never ran out")
    assert 0 < before <= cap
    assert epsilon([*Ledger(folder).releases(), RELEASE], DELTA)[0] > cap
    charge(folder, 99, Release(1000.0, 1.0, 1), cap=cap)  # something smaller still fits


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_that_allows_nothing_allows_nothing(folder, cap):
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 1, RELEASE, DELTA, cap)
    assert Ledger(folder).releases() == []


def test_a_release_without_noise_costs_everything(folder):
    silent = Release(0.0, 1.0, 1)
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 1, silent, DELTA, 1e9)
    Ledger(folder).reserve("run", 1, silent, DELTA, float("inf"))
    with pytest.raises(BudgetExhausted):
        Ledger(folder).reserve("run", 2, RELEASE, DELTA, 1e9)


# Repeated messages


def test_a_round_that_was_interrupted_before_its_commit_is_charged_once(folder):
    for _ in range(3):
        Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE]


def test_a_committed_round_answers_with_the_same_bytes(folder):
    charge(folder, 1)
    assert Ledger(folder).cached_reply("run", 1) == b"update of round 1"
    assert Ledger(folder).cached_reply("run", 1, RELEASE) == b"update of round 1"
    assert Ledger(folder).cached_reply("run", 2) is None
    assert Ledger(folder).cached_reply("other run", 1) is None
    assert Ledger(folder).releases() == [RELEASE]


def test_a_changed_request_of_the_same_round_is_charged_anew(folder):
    changed = Release(3.0, 1.0, 2)
    charge(folder, 1)
    assert Ledger(folder).cached_reply("run", 1, changed) is None
    charge(folder, 1, changed)
    assert Ledger(folder).releases() == [RELEASE, changed]


def test_training_again_after_a_commit_is_charged_anew(folder):
    charge(folder, 1)
    charge(folder, 1)
    assert Ledger(folder).releases() == [RELEASE, RELEASE]


def test_a_reply_belongs_to_the_charge_it_was_trained_under(folder):
    noisy = Release(50.0, 1.0, 1)
    first, second = Ledger(folder), Ledger(folder)
    first.reserve("run", 1, RELEASE, DELTA, 100)
    second.reserve("run", 1, noisy, DELTA, 100)
    first.commit("run", 1, b"costly")  # must not be booked on the cheap charge
    Ledger(folder).reserve("run", 1, noisy, DELTA, 100)
    assert Ledger(folder).cached_reply("run", 1, RELEASE) == b"costly"
    Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE, noisy, RELEASE]


def test_of_two_processes_with_the_same_message_only_one_commits(folder):
    first, second = Ledger(folder), Ledger(folder)
    first.reserve("run", 1, RELEASE, DELTA, 100)
    second.reserve("run", 1, RELEASE, DELTA, 100)
    first.commit("run", 1, b"first")
    with pytest.raises(ValueError, match="without a reply"):
        second.commit("run", 1, b"second")
    assert Ledger(folder).cached_reply("run", 1) == b"first"


def test_a_commit_without_a_charge_is_refused(folder):
    with pytest.raises(ValueError, match="without a reply"):
        Ledger(folder).commit("run", 1, b"update")


def test_a_reply_whose_file_is_gone_or_changed_is_not_sent(folder):
    charge(folder, 1)
    (reply,) = (folder / REPLIES_NAME).iterdir()
    reply.write_bytes(b"something else")
    assert Ledger(folder).cached_reply("run", 1) is None
    reply.unlink()
    assert Ledger(folder).cached_reply("run", 1) is None


# Two at once

RESERVE = """
import sys
from pathlib import Path
from client.ledger import BudgetExhausted, Ledger
from shared.privacy import Release
print("ready", flush=True)
sys.stdin.readline()
try:
    Ledger(Path(sys.argv[1])).reserve(sys.argv[2], 1, Release(2.0, 1.0, 2), 1e-3, float(sys.argv[3]))
    print("charged")
except BudgetExhausted:
    print("refused")
"""


def test_processes_that_reserve_at_once_cannot_pass_the_cap_together(folder):
    cap = 1.01 * epsilon([RELEASE], DELTA)[0]  # room for one
    processes = [
        subprocess.Popen([sys.executable, "-c", RESERVE, str(folder), f"run {number}", str(cap)], cwd=ROOT,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert answers == ["charged", "refused"]
    assert Ledger(folder).releases() == [RELEASE]
    assert Ledger(folder).spent(DELTA) <= cap


# Damage


def assert_refused(folder: Path) -> None:
    for use in (lambda ledger: ledger.reserve("new run", 1, RELEASE, DELTA, 1e9), Ledger.releases,
                lambda ledger: ledger.spent(DELTA), lambda ledger: ledger.cached_reply("run", 1)):  # fmt: skip
        with pytest.raises(LedgerError) as caught:
            use(Ledger(folder))
        assert caught.value.code == "ledger-corrupt"


def test_a_ledger_that_lost_its_last_line_is_refused(used):
    lines = (used / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (used / LEDGER_NAME).write_bytes(b"".join(lines[:-1]))
    assert_refused(used)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, -1, -2])
def test_a_ledger_that_was_cut_is_refused(used, num_bytes):
    path = used / LEDGER_NAME
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(used)


@pytest.mark.parametrize("name", [LEDGER_NAME, HEAD_NAME])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"{}\n", b"\xff\x00"])
def test_a_file_that_is_missing_or_rubbish_is_refused(used, name, content):
    (used / name).unlink()
    if content is not None:
        (used / name).write_bytes(content)
    assert_refused(used)


@pytest.mark.parametrize(("number", "old", "new"), [(0, "2.0", "9.0"), (2, "2.0", "9.0"), (1, "commit", "charge"),
                                                    (0, '"delta": ', '"delta":  ')])  # fmt: skip
def test_an_edited_line_is_refused(used, number, old, new):
    path = used / LEDGER_NAME
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new)
    path.write_text("".join(lines))
    assert_refused(used)


def test_a_line_that_was_taken_out_or_moved_is_refused(used):
    path = used / LEDGER_NAME
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for content in (second + third, first + third, second + first + third, first + third + second, first + first):
        path.write_bytes(content)
        assert_refused(used)


def test_an_older_copy_of_one_file_is_refused(used, tmp_path):
    shutil.copy(used / LEDGER_NAME, tmp_path)
    charge(used, 3)
    shutil.copy(tmp_path / LEDGER_NAME, used)
    assert_refused(used)


def test_a_folder_that_others_can_write_is_refused(used):
    used.chmod(0o777)
    assert_refused(used)
    used.chmod(0o700)
    assert Ledger(used).releases() == [RELEASE, RELEASE]


def test_files_of_the_ledger_are_the_sites_alone(used):
    assert used.stat().st_mode & 0o077 == 0
    for name in (LEDGER_NAME, HEAD_NAME):
        assert (used / name).stat().st_mode & 0o077 == 0


# Interruptions


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4, 5])
def test_on_a_full_disk_nothing_may_be_trained_and_no_charge_is_lost(folder, monkeypatch, failing_call):
    """Every write is followed by an fsync: fail each of them in turn."""
    calls = 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LedgerError):
        Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    monkeypatch.undo()
    Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE]
    lines = (folder / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (folder / LEDGER_NAME).write_bytes(b"".join(lines[:-1]))
    assert_refused(folder)  # the head has caught up: even now the line cannot be taken away


def test_a_reply_that_cannot_be_kept_may_not_leave(folder, monkeypatch):
    ledger = Ledger(folder)
    ledger.reserve("run", 1, RELEASE, DELTA, 100)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LedgerError):
        ledger.commit("run", 1, b"update")
    monkeypatch.undo()
    assert Ledger(folder).cached_reply("run", 1) is None
    assert Ledger(folder).releases() == [RELEASE]


@pytest.mark.parametrize(("num_bytes", "rubbish"), [(1, b""), (40, b""), (-1, b""), (40, bytes(4096))])
def test_a_line_half_written_when_the_power_failed_is_written_again(used, num_bytes, rubbish):
    path, head = used / LEDGER_NAME, used / HEAD_NAME
    before, head_before = path.read_bytes(), head.read_bytes()
    charge(used, 3)
    line = path.read_bytes()[len(before) :].splitlines(keepends=True)[0]
    path.write_bytes(before + line[:num_bytes] + rubbish)
    head.write_bytes(head_before)
    assert Ledger(used).releases() == [RELEASE, RELEASE]
    charge(used, 3)
    assert Ledger(used).releases() == [RELEASE, RELEASE, RELEASE]
    assert path.read_bytes().count(b"\n") == 5
    assert path.read_bytes().endswith(b"\n")


def test_a_line_whose_head_was_not_written_any_more_counts(used):
    head_before = (used / HEAD_NAME).read_bytes()
    Ledger(used).reserve("run", 3, RELEASE, DELTA, 100)
    (used / HEAD_NAME).write_bytes(head_before)
    assert Ledger(used).releases() == [RELEASE, RELEASE, RELEASE]
