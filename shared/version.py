"""The version that every command reports."""

import argparse
from importlib.metadata import PackageNotFoundError, version


def add_version(parser: argparse.ArgumentParser) -> None:
    """Let a command answer `--version` with its name and the installed version."""
    try:
        number = version("fedcmr")
    except PackageNotFoundError:
        number = "not installed: a checkout of its source"
    parser.add_argument("--version", action="version", version=f"%(prog)s {number}")
