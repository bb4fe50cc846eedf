"""Asking an archive again: it may be busy, or restarted in the middle of the night."""

import time
from collections.abc import Callable
from typing import TypeVar

from fedcmr.client.archive.archive import Answered, Broken, NotFetched, NotReached

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
MAX_ANSWERS = 3
"""Errors in a row that a question may be answered with."""

Result = TypeVar("Result")


class Patience:
    """Repeats what may pass, with growing pauses.

    Before the archive has answered for the first time nothing is repeated: then a name is wrong, or a firewall is in
    the way, and whoever sits there should know at once.
    """

    def __init__(self, address: str, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Begin without a connection.

        Args:
            address: The archive, for messages.
            seconds: For how long to try while there is no connection.
            sleep: Waits.
        """
        self.address, self.seconds, self.sleep = address, seconds, sleep
        self.has_answered = False

    def ask(self, question: Callable[[], Result]) -> Result:
        """What a question returns, perhaps after some errors.

        Raises:
            NotFetched: The archive answers with an error, again and again.
            NotReached: There is no connection.
        """
        num_answers, waited_s, wait_s = 0, 0.0, FIRST_WAIT_S
        while True:
            try:
                result = question()
                self.has_answered = True
                return result
            except Answered as error:
                self.has_answered = True
                num_answers, waited_s = num_answers + 1, 0.0
                if not error.passing or num_answers == MAX_ANSWERS:
                    raise NotFetched(error.code) from None
            except Broken as error:
                if not self.has_answered or waited_s >= self.seconds:
                    raise NotReached(
                        f"{self.address} is not reached ({error}): are host and port right, does the archive run, and "
                        "may this machine connect to it? What is finished is kept, the same command resumes there"
                    ) from None
            self.sleep(min(wait_s, max(self.seconds - waited_s, FIRST_WAIT_S)))
            waited_s, wait_s = waited_s + wait_s, min(2 * wait_s, LONGEST_WAIT_S)
