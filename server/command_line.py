"""Settings on a command line: `key=value` anywhere among the words, with or without `--set` in front."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from fedcmr.shared.command_parser import CommandParser

SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.DOTALL)
"""`privacy.target_epsilon=3`; no option, and no path with a slash before the sign."""


class SettingsParser(CommandParser):
    """A parser that also takes settings, once `add_settings` was called.

    argparse alone would give a `key=value` that follows an option of several values, such as `--data DIR DIR`, to that
    option, and would refuse one that follows any other option. So words of that shape are taken out first.
    """

    _takes_settings = False
    _config: str | None = None

    def add_config(self, default: str = "default") -> None:
        """Add `--config`; the result's `given_config` is None where it was left out, and `config` then the default."""
        self._config = default
        self.add_argument("--config", help=f"name under configs/ or path of a YAML file (default: {default})")

    def add_settings(self) -> None:
        """Add `key=value ...` and `--set key=value ...`; the result's `settings` has them in the given order."""
        self._takes_settings = True
        self.add_argument(
            "loose",
            nargs="*",
            metavar="key=value",
            help="settings, any key of configs/default.yaml, for example seed=1 or privacy.target_epsilon=3",
        )
        self.add_argument(
            "--set", nargs="*", action="extend", default=[], metavar="key=value", help="the same; it may be left out"
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """See `argparse.ArgumentParser.parse_known_args`."""
        if not self._takes_settings:
            return super().parse_known_args(args, namespace)
        words = sys.argv[1:] if args is None else list(args)
        given = [word for word in words if SETTING.fullmatch(word)]
        found, unknown = super().parse_known_args([word for word in words if not SETTING.fullmatch(word)], namespace)
        found.settings = [*given, *found.set, *found.loose]
        if self._config is not None:
            found.given_config, found.config = found.config, found.config or self._config
        return found, unknown
