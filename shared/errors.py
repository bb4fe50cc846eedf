"""Errors that the user can correct, and how a command line shows them."""

import errno
import signal
import sys
from collections.abc import Callable

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""A full, read-only or forbidden folder is the user's to correct, wherever it shows."""


class UserError(Exception):
    """Something that the user can correct: the message names the file or setting, what was expected and what came.

    The message is one line, holds no patient's value, and is shown without a traceback.
    """


def run_command(command: Callable[[], None]) -> int:
    """Run a command's body and turn what a user can correct into one line on stderr.

    Returns:
        The process's exit code: 0 done, 2 for a `UserError`, 130 after an interruption (as shells expect of SIGINT).
    """
    # A supervisor's SIGTERM stops a run as Ctrl-C does: what is finished stays, the same command resumes from there.
    # SIGINT is set too, because a shell starts background jobs with it ignored.
    stops = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(stop, signal.default_int_handler) for stop in stops]
    try:
        command()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {place}{error.strerror}: free space or choose another folder; what is finished is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished stages and rounds are kept, the same command resumes there", file=sys.stderr)
        return 130
    finally:
        for stop, handler in zip(stops, previous, strict=True):
            signal.signal(stop, handler)
    return 0
