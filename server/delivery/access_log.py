"""`DIR/logs/delivery.log`: one line of JSON for every call, a record of who fetched what. Never a token."""

import json
import os
import sys
import threading
import time
from pathlib import Path

LOG_NAME = "delivery.log"
REFUSED_INTERVAL_S = 1.0
"""Seconds between two entries for calls without a token, with their number: a flood must not fill the disk."""


class AuditLog:
    """Appends to the log; safe for several threads."""

    def __init__(self, folder: Path):
        (folder / "logs").mkdir(mode=0o700, exist_ok=True)
        self.path = folder / "logs" / LOG_NAME
        self._lock = threading.Lock()
        self._num_refused = 0
        self._last_refused = -REFUSED_INTERVAL_S
        self._complained = False

    def call(self, **facts: object) -> None:
        """Log one call of a site."""
        with self._lock:
            self._write(facts)

    def refused(self, peer: str, client: str, method: str) -> None:
        """Log a call without a valid token.

        Args:
            peer: The other end of the connection; the gateway, for whoever calls through it.
            client: Address of the caller.
            method: The method that was called.
        """
        with self._lock:
            self._num_refused += 1
            now = time.monotonic()
            if now - self._last_refused < REFUSED_INTERVAL_S:
                return
            self._write(
                {
                    "site": None,
                    "peer": peer,
                    "client": client,
                    "method": method,
                    "code": "UNAUTHENTICATED",
                    "calls": self._num_refused,
                }
            )
            self._num_refused, self._last_refused = 0, now

    def _write(self, facts: dict[str, object]) -> None:
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}) + "\n"
        try:
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
                file.write(line)
            self._complained = False
        except OSError as error:
            # The cases are delivered already; whoever watches the service must learn that the log has a gap.
            if not self._complained:
                print(f"{self.path} cannot be written ({error.strerror}): calls are not logged", file=sys.stderr)
            self._complained = True
