"""The ServerApp's executor, kept running: `python -m fedcmr.server.deployment.executor COMMAND...`.

Flower's executor ends at any error that the SuperLink answers it with, such as the HTTP 500 of a busy one, and no later
run would find it. Here it is started again, until it fails at once several times in a row: that is no passing error.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

PAUSE_S, QUICK_S, MAX_QUICK = 2.0, 30.0, 5
"""Seconds before it is started again; a failure within so many is a quick one; how many of those in a row end it."""


def main() -> int:
    """Run the command of the command line until it ends well, is told to end by SIGTERM, or is of no use."""
    signal.signal(signal.SIGTERM, _end)
    return keep_running([*sys.argv[1:], "--parent-pid", str(os.getpid())])


def keep_running(command: Sequence[str]) -> int:
    """Start a command again as often as it fails; it does not outlive this process's orderly end.

    Returns:
        0 where it ended well, else the exit code of the last of `MAX_QUICK` quick failures in a row.
    """
    num_quick = 0
    while True:
        started = time.monotonic()
        process = subprocess.Popen(command)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        num_quick = num_quick + 1 if time.monotonic() - started < QUICK_S else 0
        if code == 0 or num_quick == MAX_QUICK:
            return code
        print(f"{command[0]} ended with code {code}: it is started again", file=sys.stderr, flush=True)
        time.sleep(PAUSE_S)


def _end(_sign: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
