"""A site's log of errors tells each of them once in full, and cannot fill its disk."""

import stat
import threading

import pytest

from fedcmr.client.error_log import EARLIER_NAME, LOG_NAME, MAX_BYTES, MAX_ENTRY_CHARS, note


def fail(folder, text, code="internal-error"):
    try:
        raise ValueError(text)
    except ValueError:
        note(folder, code)


def test_an_error_is_told_in_full_once_and_then_in_a_line(tmp_path):
    for _ in range(50):
        fail(tmp_path, "a patient's file is damaged")
    fail(tmp_path, "another one")
    text = (tmp_path / LOG_NAME).read_text()
    assert text.count("Traceback") == 2 and text.count(" again\n") == 49 and text.count("is damaged") == 1
    assert len(text) < 50 * 100, "fifty requests once wrote fifty tracebacks"
    assert stat.S_IMODE((tmp_path / LOG_NAME).stat().st_mode) == 0o600


def test_a_code_without_an_error_has_no_traceback(tmp_path):
    note(tmp_path, "a patient's gradient failed and counts as zero")
    assert "NoneType" not in (tmp_path / LOG_NAME).read_text()


def test_a_flood_keeps_the_newest_errors_and_no_more(tmp_path):
    for number in range(400):
        fail(tmp_path, f"{number} " + "x" * MAX_ENTRY_CHARS)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {LOG_NAME, EARLIER_NAME} and all(size <= MAX_BYTES for size in sizes.values())
    text = (tmp_path / LOG_NAME).read_text()
    assert "ValueError: 399 " in text or "399 xxx" in text
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_long_error_keeps_its_beginning_and_its_end(tmp_path):
    fail(tmp_path, "begins" + "x" * 100_000 + "ends")
    text = (tmp_path / LOG_NAME).read_text()
    assert "Traceback" in text and "ends" in text and "[...]" in text and len(text) < 2 * MAX_ENTRY_CHARS


def test_what_is_no_unicode_is_noted_all_the_same(tmp_path):
    fail(tmp_path, "\ud800")
    assert "ValueError" in (tmp_path / LOG_NAME).read_text()


def test_several_at_once_lose_nothing(tmp_path):
    threads = [threading.Thread(target=fail, args=(tmp_path, f"number {i:02d}")) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / LOG_NAME).read_text()
    assert all(f"ValueError: number {i:02d}" in text for i in range(20))


@pytest.mark.parametrize("code", ["a", "b"])
def test_equal_errors_under_another_code_are_another_entry(tmp_path, code):
    fail(tmp_path, "x", "c")
    fail(tmp_path, "x", code)
    assert (tmp_path / LOG_NAME).read_text().count("Traceback") == 2
