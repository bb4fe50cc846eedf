"""Texts from outside are printed as they are."""

import io

import pytest
from rich.table import Table

from fedcmr.shared.console import plain_console


@pytest.mark.parametrize(
    "text", ["/data/[siemens] export", "/data/scan[/old]", "/data/:on:/x", "[red]a[/red]", "a\\[b]"]
)
def test_what_looks_like_markup_stays_what_it_is(text):
    file = io.StringIO()
    console = plain_console(file=file, width=200)
    console.print(text)
    table = Table("", text)
    table.add_row("x", text)
    console.print(table)
    assert file.getvalue().count(text) == 3


@pytest.mark.parametrize(("columns", "width"), [(None, 120), ("90", 90)])
def test_a_pipe_is_wide_enough_for_tables_unless_the_user_says_otherwise(monkeypatch, columns, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert plain_console().width == width
