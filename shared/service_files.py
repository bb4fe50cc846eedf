"""Files by which an institution's own tools run a part of fedcmr: filled templates, and paths that they may name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedcmr.shared.errors import UserError

PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+@=-]*")
ACCOUNT = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - none is used
"""Folders that a hardened systemd service does not see (ProtectHome, PrivateTmp)."""


def render(folder: Path, name: str, values: Mapping[str, Any]) -> str:
    """Fill a Jinja template of `folder`; a name without a value is an error."""
    # Units and shell, not HTML: `check_paths` and `check_account` bound what the values may hold.
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701
    )
    return environment.get_template(name).render(values)


def write_all(files: Mapping[str, str], out: Path) -> list[Path]:
    """Write texts into a folder, over those that are there, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def check_paths(paths: Sequence[Path], seen_by_service: bool) -> None:
    """Refuse what systemd, Docker or a shell would read in more than one way.

    Args:
        paths: Absolute ones.
        seen_by_service: Whether a systemd service must see them.

    Raises:
        UserError: A path has other characters, or lies where no service looks.
    """
    for path in paths:
        if not PLAIN_PATH.fullmatch(str(path)):
            raise UserError(f"{path}: expected a path of letters, digits and ._/+@=- alone; rename or move the folder")
        if seen_by_service and any(path.is_relative_to(hidden) for hidden in HIDDEN):
            raise UserError(f"{path}: a service does not see {', '.join(HIDDEN)}; move it, for example to /srv or /opt")


def check_account(name: str) -> None:
    """Refuse what is no name of an account of the system, and the account that may do everything.

    Raises:
        UserError: It cannot be used.
    """
    if not ACCOUNT.fullmatch(name) or name == "root":
        raise UserError(f"Expected --user to be an account of its own, such as fedcmr, got {name!r}.")
