"""A ledger that was damaged, taken back, repaired, or interrupted in the middle of a write."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedcmr.client import hash_chained_log
from fedcmr.client.ledger import LEDGER_NAME, REPLIES_NAME, Ledger, LedgerError, WorkFailed, default_replica
from fedcmr.shared.privacy import epsilon
from tests.client.ledger_rounds import DELTA, RELEASE, charge

ROOT = Path(__file__).resolve().parents[2]


# Damage


def replica_of(folder: Path) -> Path:
    return default_replica(folder)


def assert_refused(folder: Path, match: str | None = None) -> None:
    for use in (
        lambda ledger: ledger.reserve("new run", 1, RELEASE, DELTA, 1e9),
        Ledger.releases,
        lambda ledger: ledger.spent(DELTA),
        lambda ledger: ledger.cached_reply("run", 1),
    ):
        with pytest.raises(LedgerError, match=match) as caught:
            use(Ledger(folder))
        assert caught.value.code == "ledger-corrupt"
        assert "\n" not in str(caught.value)


def test_a_replica_of_an_earlier_version_keeps_its_name(used):
    replica_of(used).rename(used.with_name(f"{used.name}.witness"))
    Ledger(used).reserve("new run", 1, RELEASE, DELTA, 1e9)
    assert replica_of(used).suffix == ".witness"
    assert (used / LEDGER_NAME).read_bytes() == replica_of(used).read_bytes()
    replica_of(used).with_suffix(".replica").write_bytes(b"")
    assert replica_of(used).suffix == ".replica", "two replicas: the newer name counts"
    assert_refused(used, "older than|older by|differs")


def test_a_ledger_that_lost_its_last_line_is_refused(used):
    lines = (used / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (used / LEDGER_NAME).write_bytes(b"".join(lines[:-1]))
    assert_refused(used, "older than its second copy")


@pytest.mark.parametrize("num_bytes", [0, 1, 100, -1, -2])
def test_a_ledger_that_was_cut_is_refused(used, num_bytes):
    path = used / LEDGER_NAME
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(used)


@pytest.mark.parametrize("which", ["ledger", "replica"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"{}\n", b"[]\n", b"\xff\x00", b"\xff\x00\n"])
def test_a_copy_that_is_missing_or_rubbish_is_refused(used, which, content):
    path = used / LEDGER_NAME if which == "ledger" else replica_of(used)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert_refused(used)


def test_an_older_second_copy_is_refused_too(used):
    """Both may be old, and this is the only sign of it."""
    lines = replica_of(used).read_bytes().splitlines(keepends=True)
    replica_of(used).write_bytes(b"".join(lines[:-2]))
    assert_refused(used, "older by several lines")


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    ("number", "old", "new"),
    [
        (1, "2.0", "9.0"),
        (3, "2.0", "9.0"),
        (2, "commit", "charge"),
        (0, "open", "OPEN"),
        (1, '"delta": ', '"delta":  '),
    ],
)
def test_an_edited_line_is_refused(used, number, old, new, both):
    """In both copies too: each line holds the hash of the one before. Only the very last could be exchanged."""
    path = used / LEDGER_NAME
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[number]
    lines[number] = lines[number].replace(old, new)
    path.write_text("".join(lines))
    if both and number < len(lines) - 1:
        replica_of(used).write_text("".join(lines))
    assert_refused(used, "edited" if both and number < len(lines) - 1 else "differs")


@pytest.mark.parametrize("damage", ["edited", "cut", "removed"])
def test_what_a_process_has_read_before_is_compared_again(used, damage):
    """It parses only what is new, and must notice that the rest is no longer what it was."""
    ledger = Ledger(used)
    known = len(ledger.releases())
    charge(used, 3)
    assert len(ledger.releases()) == known + 1, "the line of another process"
    lines = (used / LEDGER_NAME).read_text().splitlines(keepends=True)
    if damage == "edited":
        lines[1] = lines[1].replace("2.0", "9.0")
    for path in (used / LEDGER_NAME, replica_of(used)):
        path.write_text("".join(lines[:-1] if damage == "cut" else lines[2:] if damage == "removed" else lines))
    if damage == "cut":  # both alike: nobody can tell, but the process must not count what it remembers either
        assert ledger.releases() == Ledger(used).releases()
        return
    with pytest.raises(LedgerError, match="edited"):
        ledger.releases()


def test_a_line_that_was_taken_out_or_moved_is_refused(used):
    path = used / LEDGER_NAME
    opened, first, second, third = path.read_bytes().splitlines(keepends=True)
    for content in (
        opened + second + third,
        first + second + third,
        opened + second + first + third,
        opened + first + third + second,
        opened + first + first,
    ):
        for copies in ((path,), (path, replica_of(used))):
            for copy in copies:
                copy.write_bytes(content)
            assert_refused(used)


def test_a_ledger_that_was_restored_from_an_older_backup_is_refused(used, tmp_path):
    """The whole folder, replies and all; the second copy lies elsewhere."""
    shutil.copytree(used, tmp_path / "backup")
    charge(used, 3)
    shutil.rmtree(used)
    shutil.copytree(tmp_path / "backup", used)
    assert_refused(used, "older than its second copy")


def test_a_ledger_that_was_removed_after_its_first_use_is_refused(used):
    shutil.rmtree(used)
    assert_refused(used, "missing")


def test_the_ledger_of_another_site_is_refused(used, tmp_path):
    charge(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / LEDGER_NAME, used / LEDGER_NAME)
    assert_refused(used, "differs")


def test_a_second_copy_on_another_disk_is_found_there_and_must_be_there(folder, tmp_path):
    place = tmp_path / "disk" / "copy.jsonl"
    with pytest.raises(LedgerError, match="ledger_replica"):
        Ledger(folder, place).reserve("run", 1, RELEASE, DELTA, 100)
    place.parent.mkdir()
    Ledger(folder, place).reserve("run", 1, RELEASE, DELTA, 100)
    assert place.read_bytes() == (folder / LEDGER_NAME).read_bytes()
    assert not replica_of(folder).exists()
    place.parent.rename(tmp_path / "unmounted")
    with pytest.raises(LedgerError, match="mount"):
        Ledger(folder, place).releases()


def test_a_ledger_of_the_first_version_is_refused_in_a_line_that_says_so(folder):
    """Each of its lines began with its kind, and it had a head in place of a second copy."""
    folder.mkdir(parents=True)
    (folder / LEDGER_NAME).write_text('{"kind": "charge", "run_id": "r", "round": 1, "previous": "' + "0" * 64 + '"}\n')
    (folder / "head.json").write_text("{}")
    assert_refused(folder, "earlier version")
    with pytest.raises(LedgerError, match="earlier version"):
        Ledger(folder).repair()


@pytest.mark.parametrize("which", ["folder", "ledger", "replica", "the replica's folder"])
def test_what_others_can_write_is_refused_with_the_mend(used, which):
    path = {"folder": used, "ledger": used / LEDGER_NAME, "replica": replica_of(used)}.get(which, used.parent)
    mode = path.stat().st_mode
    path.chmod(mode | 0o002)
    assert_refused(used, "chmod o-w")
    path.chmod(mode)
    assert Ledger(used).releases() == [RELEASE, RELEASE]


def test_files_of_the_ledger_are_the_sites_alone(used):
    for path in (used, used / LEDGER_NAME, replica_of(used), *(used / REPLIES_NAME).iterdir()):
        assert path.stat().st_mode & 0o077 == 0


# Repair


@pytest.mark.parametrize(
    "damage",
    ["ledger removed", "ledger cut", "ledger old", "ledger edited", "replica removed", "replica edited", "replica cut"],
)
def test_repair_mends_one_copy_from_the_other_and_gives_up_no_charge(used, damage):
    which, how = damage.split()
    path = used / LEDGER_NAME if which == "ledger" else replica_of(used)
    content = path.read_bytes()
    if how == "removed":
        shutil.rmtree(used) if which == "ledger" else path.unlink()
    else:
        path.write_bytes(
            {
                "cut": content[:-5],
                "old": content[: content.rfind(b"\n", 0, -1) + 1],
                "edited": content.replace(b"2.0", b"9.0"),
            }[how]
        )
    if damage != "replica cut":  # its torn end: the file has the line, so it might be an interruption's
        assert_refused(used, "--repair")
    Ledger(used).repair()
    assert Ledger(used).releases() == [RELEASE, RELEASE]
    assert (used / LEDGER_NAME).read_bytes() == replica_of(used).read_bytes()
    assert [change["kind"] for change in Ledger(used).changes()] == ["open", "repair"]
    charge(used, 3)
    assert Ledger(used).releases() == [RELEASE] * 3


def test_repair_refuses_where_no_copy_holds_all_that_the_other_one_says(used):
    path, replica = used / LEDGER_NAME, replica_of(used)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for ledger, second in (
        (b"".join(lines[:2]), content.replace(b"2.0", b"9.0")),  # an old backup, and a longer copy that was edited
        (content[:-5], content.replace(b"2.0", b"9.0")),
        (b"", b""),
    ):
        path.write_bytes(ledger)
        replica.write_bytes(second)
        with pytest.raises(LedgerError, match="from a backup"):
            Ledger(used).repair()
        assert (path.read_bytes(), replica.read_bytes()) == (ledger, second), "nothing was touched"


def test_repair_refuses_two_ledgers_that_parted(used, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(used, tmp_path / name / "ledger")
        shutil.copy(replica_of(used), tmp_path / name)
        charge(tmp_path / name / "ledger", 3 if name == "one" else 4)
    shutil.copy(tmp_path / "two" / "ledger.replica", tmp_path / "one")
    with pytest.raises(LedgerError, match="from a backup"):
        Ledger(tmp_path / "one" / "ledger").repair()


# Interruptions


@pytest.mark.parametrize("failing_call", range(1, 10))
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
    assert Ledger(folder).spent(DELTA) in (0, epsilon([RELEASE], DELTA)[0])
    with contextlib.suppress(WorkFailed):  # the charge may be there already; nothing was trained under it
        Ledger(folder).reserve("run", 1, RELEASE, DELTA, 100)
    assert Ledger(folder).releases() == [RELEASE]
    lines = (folder / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (folder / LEDGER_NAME).write_bytes(b"".join(lines[:-1]))
    assert_refused(folder)  # the second copy has caught up: even now the line cannot be taken away


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
    path, replica = used / LEDGER_NAME, replica_of(used)
    before = path.read_bytes()
    charge(used, 3)
    line = path.read_bytes()[len(before) :].splitlines(keepends=True)[0]
    path.write_bytes(before + line[:num_bytes] + rubbish)
    replica.write_bytes(before)
    assert Ledger(used).releases() == [RELEASE, RELEASE]
    charge(used, 3)
    assert Ledger(used).releases() == [RELEASE, RELEASE, RELEASE]
    assert path.read_bytes().count(b"\n") == 6
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("num_bytes", [0, 1, 40, -1])
def test_a_line_that_the_second_copy_lacks_or_has_in_part_counts(used, num_bytes):
    before = replica_of(used).read_bytes()
    Ledger(used).reserve("run", 3, RELEASE, DELTA, 100)
    line = replica_of(used).read_bytes()[len(before) :]
    replica_of(used).write_bytes(before + line[:num_bytes])
    assert Ledger(used).releases() == [RELEASE, RELEASE, RELEASE]
    assert replica_of(used).read_bytes() == (used / LEDGER_NAME).read_bytes()


def test_both_copies_cut_alike_within_a_line_are_refused(used):
    """No interruption cuts both: a line is begun in the second copy only when the first has all of it."""
    for path in (used / LEDGER_NAME, replica_of(used)):
        path.write_bytes(path.read_bytes()[:-5])
    assert_refused(used, "cut")


FILL = """
import resource, sys
from pathlib import Path
from fedcmr.client.ledger import Ledger, LedgerError
from fedcmr.shared.privacy import Release
folder = Path(sys.argv[1])
for limit in range(0, 3000, 97):  # no file may grow past this many bytes
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = Ledger(folder / str(limit) / "ledger")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    outcome = "refused"
    try:
        ledger.reserve("run", 1, Release(2.0, 1.0, 2), 1e-3, 100)
        outcome = "charged"
        ledger.commit("run", 1, bytes(500))
        outcome = "committed"
    except LedgerError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(limit, outcome, flush=True)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_byte_loses_no_charge_and_allows_no_training_without_one(tmp_path):
    """A real limit of the operating system: the write comes back short, then fails."""
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert {outcome for _, outcome in outcomes} == {"refused", "charged", "committed"}
    for limit, outcome in outcomes:
        folder = tmp_path / limit / "ledger"
        if outcome != "refused":
            assert Ledger(folder).releases() == [RELEASE]
        assert (Ledger(folder).cached_reply("run", 1) == bytes(500)) == (outcome == "committed")
        if outcome != "committed":
            with contextlib.suppress(WorkFailed):  # the charge may be there, without anything that was trained
                charge(folder, 1)
        assert Ledger(folder).releases() == [RELEASE]


@pytest.mark.parametrize("link", ["symbolic", "hard", "into the folder"])
def test_a_second_copy_that_is_the_first_one_is_refused(used, link):
    """It would agree with the ledger whatever became of it."""
    copy = replica_of(used)
    content = copy.read_bytes()
    copy.unlink()
    if link == "hard":
        copy.hardlink_to(used / LEDGER_NAME)
    elif link == "symbolic":
        copy.symlink_to(used / LEDGER_NAME)
    else:
        (used / "copy").write_bytes(content)
        copy.symlink_to(used / "copy")
    assert_refused(used, "a copy of its own")
    copy.unlink()
    copy.write_bytes(content)
    assert len(Ledger(used).releases()) == 2


def hold(folder, inside, go_on):
    with Ledger(folder)._log.locked():
        inside.set()
        go_on.wait(30)


def test_a_lock_file_that_is_deleted_lets_nobody_in(used):
    """Whoever makes it anew waits for the one that holds the ledger all the same."""
    inside, go_on = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold, args=(used, inside, go_on))
    holder.start()
    assert inside.wait(30)
    (used / "lock").unlink()
    written = threading.Event()
    other = threading.Thread(target=lambda: (Ledger(used).reserve("run", 3, RELEASE, DELTA, 100), written.set()))
    other.start()
    assert not written.wait(0.5), "it wrote while the lock was held"
    go_on.set()
    other.join(30)
    holder.join(30)
    assert written.is_set() and len(Ledger(used).releases()) == 3


def test_a_lock_on_a_file_that_is_gone_is_taken_again(tmp_path, monkeypatch):
    """Two that waited for one file, deleted meanwhile, do not both get in: where folders cannot be locked."""
    path = tmp_path / "lock"
    first = hash_chained_log._locked_file(path)
    first.__enter__()
    inside, asked = threading.Event(), threading.Event()

    def flock(descriptor, operation):
        asked.set()
        fcntl.flock(descriptor, operation)

    monkeypatch.setattr(hash_chained_log, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX))

    def wait():
        with hash_chained_log._locked_file(path):
            assert hash_chained_log._is_open_as(os.open(path, os.O_RDONLY), path)
            inside.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(30), "it has opened the file that goes"
    path.unlink()
    path.touch()
    newest = hash_chained_log._locked_file(path)
    newest.__enter__()
    first.__exit__(None, None, None)
    assert not inside.wait(0.5), "it held a lock that nobody else can see"
    newest.__exit__(None, None, None)
    waiting.join(30)
    assert inside.is_set()
