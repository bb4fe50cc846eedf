"""Flower's own output at a site: kept in a log of bounded size, and told in plain words where it matters.

SITE/flwr/supernode.log, supernode.log.1     what SuperNode, executor and ClientApp print, 512 KiB each at most
"""

import re
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fedcmr.shared.permissions import private_opener

LOG_NAME, EARLIER_NAME = "supernode.log", "supernode.log.1"
MAX_BYTES = 512 * 1024
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ONLINE = re.compile(r"SuperNode ID: \d+")
NUM_LAST = 40
REASONS = (
    (
        re.compile(r"\b401\b|unauthori[sz]ed|authentication failed", re.IGNORECASE),
        "the coordinator refuses this site's key. Remedy: ask whether node_key.pub is registered there under this "
        "site's name ('fedcmr-server register'), and whether 'fedcmr-client check' finds this machine's clock right",
    ),
    (
        re.compile(r"\b50[234]\b|bad gateway|service unavailable", re.IGNORECASE),
        "the coordinator's gateway answers, but its SuperLink does not: it may be starting",
    ),
    (
        re.compile(r"\b404\b"),
        "the coordinator's gateway does not know what this version of Flower calls. Remedy: the same version at both",
    ),
    (
        re.compile(r"exit code: 305\b", re.IGNORECASE),
        "the coordinator does not take the site in: it still knows it from before, for a minute, or this site's key is "
        "not registered there. Remedy, where this lasts: ask whether node_key.pub is registered under this site's name "
        "('fedcmr-server register')",
    ),
)
"""What the end of a SuperNode's output means, the surest sign first."""


def reason_of(text: str) -> str | None:
    """Why a SuperNode ended, in words, from the end of its output; None where nothing is known."""
    return next((words for sign, words in REASONS if sign.search(text)), None)


class SuperNodeLog:
    """Takes the output of a site's processes.

    Args:
        folder: `SITE/flwr`.
        on_online: Called when the SuperLink has taken the SuperNode in.
    """

    def __init__(self, folder: Path, on_online: Callable[[], None]) -> None:
        self.path = folder / LOG_NAME
        self._on_online = on_online
        self._lock = threading.Lock()
        self._last: deque[str] = deque(maxlen=NUM_LAST)

    def follow(self, output: IO[bytes]) -> None:
        """Read a process's output to its end, in a thread of its own."""
        threading.Thread(target=self._read, args=(output,), daemon=True).start()

    def reason(self) -> str | None:
        """Why the SuperNode ended, in words; what was printed before is forgotten."""
        with self._lock:
            text = "\n".join(self._last)
            self._last.clear()
        return reason_of(text)

    def _read(self, output: IO[bytes]) -> None:
        for content in iter(output.readline, b""):
            line = COLOURS.sub("", content.decode(errors="replace")).rstrip()
            with self._lock:
                self._last.append(line)
                self._write(line)
            if ONLINE.search(line):
                self._on_online()

    def _write(self, line: str) -> None:
        try:
            if self.path.exists() and self.path.stat().st_size > MAX_BYTES:
                self.path.replace(self.path.with_name(EARLIER_NAME))
            with open(self.path, "a", encoding="utf-8", opener=private_opener) as file:
                file.write(line[:4096] + "\n")
        except OSError:
            pass  # a full disk must not stop what reads the output: its process would wait for ever
