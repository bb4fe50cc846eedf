"""That a site is joined, and how it stands with the coordinator: known to `fedcmr-client status`, and joined once.

SITE/flwr/join.lock    held by the `join` that runs
SITE/flwr/join.json    {"state": ..., "since": UTC}: what that `join` last told
"""

import contextlib
import fcntl
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from fedcmr.client.policy import SiteSettings
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_opener

LOCK_NAME, STATE_NAME = "join.lock", "join.json"
PATIENCE_S = 2.0
"""`status` holds the lock for a moment."""


def home_of(site: SiteSettings) -> Path:
    """Flower's home in the site's folder."""
    return site.folder / "flwr"


def lock(site: SiteSettings) -> TextIO:
    """Hold the site's lock for as long as the file is open.

    Raises:
        UserError: Another `join` of this site runs: Flower would refuse one of the two again and again.
    """
    home_of(site).mkdir(parents=True, exist_ok=True, mode=0o700)
    file = open(home_of(site) / LOCK_NAME, "w", opener=private_opener)  # noqa: SIM115 - the caller holds it
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > deadline:
                file.close()
                raise UserError(f"{site.folder} is joined already, by another 'fedcmr-client join'") from None
            time.sleep(0.1)


def tell_state(site: SiteSettings, state: str) -> None:
    """Note how the site stands."""
    noted = {"state": state, "since": datetime.now(UTC).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # a full disk does not end the work
        write_atomically(home_of(site) / STATE_NAME, json.dumps(noted).encode())


def read_state(site: SiteSettings) -> dict[str, str] | None:
    """What the `join` that runs last told, `state` and `since`; None where none runs."""
    try:
        with (home_of(site) / LOCK_NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except OSError:
        pass
    try:
        noted = json.loads((home_of(site) / STATE_NAME).read_bytes())
        return {"state": str(noted["state"]), "since": str(noted["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"state": "starting", "since": ""}
