"""The parser of every command line: what is wrong with the words is told in one line, with the remedy."""

import argparse
import difflib
import re
from typing import NoReturn

CHOICE = re.compile(r"argument (?P<name>.+): invalid choice: '(?P<typed>.*)' \(choose from (?P<choices>.*)\)", re.S)
"""What argparse says of a value that is none of those it may be."""


class CommandParser(argparse.ArgumentParser):
    """Bad words end with code 2 and one line, as all bad input does, instead of a screen of usage above it.

    Parsers of sub-commands are of the same class.
    """

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end the process with code 2."""
        if found := CHOICE.fullmatch(message):
            choices = [choice.strip("' ") for choice in found["choices"].split(",")]
            near = difflib.get_close_matches(found["typed"].lower(), choices, n=1)
            meant = f", did you mean {near[0]!r}?" if near else f": it is one of {', '.join(choices)}"
            kind = "there is no command" if found["name"] == "COMMAND" else f"{found['name']} cannot be"
            message = f"{kind} {found['typed']!r}{meant}"
        self.exit(2, f"error: {' '.join(message.split())} ('{self.prog} --help' explains)\n")
