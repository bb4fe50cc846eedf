"""Printing to a terminal."""

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console that prints texts as they are.

    Rich reads `[siemens]` and `:on:` in a text as markup and emoji. Paths and names come from outside and may hold
    both, so what has a colour here is a `rich.text.Text`.

    Args:
        options: As for `rich.console.Console`.
    """
    return Console(**{"highlight": False, **options}, markup=False, emoji=False)
