"""Printing to a terminal."""

import os
import sys
from typing import Any

from rich.console import Console

WIDE = 120
"""Columns where the output is no terminal: a pipe or a file, in which 80 would cut what a table says."""


def plain_console(**options: Any) -> Console:
    """A console that prints texts as they are.

    Rich reads `[siemens]` and `:on:` in a text as markup and emoji. Paths and names come from outside and may hold
    both, so what has a colour here is a `rich.text.Text`.

    Args:
        options: As for `rich.console.Console`; `width` is by default that of the terminal, or `WIDE`.
    """
    stream = sys.stderr if options.get("stderr") else sys.stdout
    if options.get("width") is None and "file" not in options and not stream.isatty() and "COLUMNS" not in os.environ:
        options["width"] = WIDE
    return Console(**{"highlight": False, **options}, markup=False, emoji=False)
