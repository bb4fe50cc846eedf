"""Progress: items and shares of the work, never the number of batches."""

import sys
from io import StringIO

import pytest
from rich.console import Console

from fedcmr.shared import progress
from fedcmr.shared.progress import show_share, track, track_parts


@pytest.fixture
def lines(monkeypatch, capsys):
    """What is printed where there is no terminal, with every line due."""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", -1.0)
    return lambda: capsys.readouterr().err.splitlines()


@pytest.fixture
def bars(monkeypatch):
    """Every state of the bar on a terminal, as (completed, total, text)."""
    seen = []
    update = progress.Progress.update

    def note(self, task, **fields):
        update(self, task, **fields)
        [shown] = self.tasks
        seen.append((shown.completed, shown.total, shown.fields["text"]))

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "console", Console(file=StringIO(), force_terminal=True))
    monkeypatch.setattr(progress.Progress, "update", note)
    return seen


def test_what_is_finished_needs_no_line(lines):
    assert list(track("abc", "reading")) == ["a", "b", "c"]
    assert lines() == ["reading: 1 of 3", "reading: 2 of 3"]
    assert list(track("a", "reading")) == ["a"]
    assert lines() == []


def test_parts_cover_all_items_and_items_are_counted(lines):
    assert list(track_parts(10, 4, "drawing")) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert lines() == ["drawing: 0 %, 0 of 10", "drawing: 40 %, 4 of 10", "drawing: 80 %, 8 of 10"]
    assert list(track_parts(10, 4, None)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert lines() == []


def test_a_bar_shows_the_share_and_begins_where_an_earlier_call_stopped(bars):
    with show_share("training") as tell:
        tell(0.6, "step 60 of 100")
        tell(0.8, "step 80 of 100")
    assert bars == [(0.6, 1.0, "step 60 of 100"), (0.8, 1.0, "step 80 of 100")]
