"""Child processes that die, hang, or ask for too much, and a parent that continues."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedcmr.client.ingest.reasons import Unusable
from fedcmr.client.ingest.sandbox import Workers

MIB = 2**20
PATIENCE_S = 60.0


def work(item):
    """What a file may make of its child."""
    kind, value = item
    if kind == "crash":
        ctypes.string_at(0)  # a segmentation fault
    elif kind == "exit":
        os._exit(value)
    elif kind == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [])
        ctypes.CDLL(None).pause()  # in C code, where no Python handler would run
    elif kind == "sleep":
        time.sleep(value)
    elif kind == "memory":
        return len(bytearray(value))
    elif kind == "unusable":
        raise Unusable(value)
    elif kind == "error":
        raise KeyError("Doe^Jane")
    elif kind == "disk":
        raise OSError(28, "No space left on device", "/home/jane")
    elif kind == "print":
        os.write(1, b"Doe^Jane")
        os.write(2, b"Doe^Jane")
    return value


def codes(results) -> list:
    return [result.code if isinstance(result, Unusable) else result for result in results]


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_a_file_does_to_its_child_costs_that_file_only(num_processes, batch_size):
    items = [
        ("value", 0),
        ("crash", 0),
        ("value", 2),
        ("hang", 0),
        ("unusable", "not-dicom"),
        ("error", 0),
        ("memory", 900 * MIB),
        ("value", 7),
        ("exit", 3),
        ("memory", 5 * MIB),
    ]
    with Workers(num_processes, memory_bytes=300 * MIB, seconds=1) as workers:
        for _ in range(2):
            found = codes(workers.map(work, items, batch_size=batch_size))
            assert found == [
                0,
                "parser-crashed",
                2,
                "too-slow",
                "not-dicom",
                "unexpected-error",
                "too-large",
                7,
                "parser-crashed",
                5 * MIB,
            ]


def test_results_come_in_the_order_of_the_items_or_as_they_are_finished():
    items = [("sleep", 0.5), ("value", 1), ("value", 2)]
    with Workers(2) as workers:
        assert list(workers.map(work, items)) == [0.5, 1, 2]
        assert list(workers.as_finished(work, items)) == [(1, 1), (2, 2), (0, 0.5)]
        many = [("value", number) for number in range(1000)]
        assert list(workers.map(work, many, batch_size=7)) == list(range(1000))
        assert list(workers.map(work, [])) == []


def test_one_slow_item_does_not_let_finished_ones_pile_up():
    taken = []

    def items():
        for number in range(500):
            taken.append(number)
            yield ("sleep", 1.0) if number == 0 else ("value", number)

    with Workers(2) as workers:
        results = workers.map(work, items())
        assert next(results) == 1.0
        assert len(taken) < 200
        assert len(list(results)) == 499


def test_a_full_disk_is_told_without_the_file():
    with Workers() as workers, pytest.raises(OSError, match="No space left") as error:
        list(workers.map(work, [("disk", 0)]))
    assert (error.value.errno, error.value.filename) == (28, None)


def test_children_have_no_output(capfd):
    with Workers() as workers:
        assert list(workers.map(work, [("print", 1)])) == [1]
    assert capfd.readouterr() == ("", "")


def test_children_work_in_the_folder_of_the_parent(tmp_path, monkeypatch):
    (tmp_path / "here").touch()
    monkeypatch.chdir(tmp_path)
    with Workers() as workers:
        assert list(workers.map(os.path.exists, ["here", "there"])) == [True, False]


def test_a_child_imports_no_network_and_leaves_no_core_dump():
    # In a process of its own: the fork server here has imported what other tests asked for.
    script = (
        "from fedcmr.client.ingest.sandbox import Workers\n"
        "from tests.client.ingest.test_sandbox import state_of_a_reader\n"
        "with Workers() as workers:\n"
        "    print(*workers.map(state_of_a_reader, [0]))\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "([], (0, 0))"


def state_of_a_reader(_) -> tuple[list[str], tuple[int, int]]:
    """What a process that reads scans should not have imported, and how large a core dump it would leave."""
    import resource

    import fedcmr.client.ingest.prepare  # noqa: F401

    loaded = {name.split(".")[0] for name in sys.modules} & {"torch", "flwr", "server", "simulations"}
    return sorted(loaded), resource.getrlimit(resource.RLIMIT_CORE)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_child_outlives_its_parent(tmp_path, end):
    script = (
        "import sys\n"
        "from fedcmr.client.ingest.sandbox import Workers\n"
        "from tests.client.ingest.test_sandbox import announce\n"
        "with Workers(2) as workers:\n"
        "    list(workers.as_finished(announce, sys.argv[1:]))\n"
    )
    marks = [tmp_path / "a", tmp_path / "b"]
    root = Path(__file__).resolve().parents[3]
    # A shell's background jobs are born deaf to Ctrl-C, and pass that on.
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, marks)],
        cwd=root,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        children = [int(_text_of(mark)) for mark in marks]
        assert all(_runs(child) for child in children)
        process.send_signal(end)
        process.wait(PATIENCE_S)
    finally:
        process.kill()
    deadline = time.monotonic() + PATIENCE_S
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(child) for child in children)


def announce(mark: str) -> None:
    """Say which process this is, and never come to an end."""
    partial = Path(mark + ".partial")
    partial.write_text(str(os.getpid()))
    partial.rename(mark)
    time.sleep(60)


def _text_of(path: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.read_text()


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False
