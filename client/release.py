"""Private work under a charge: what is answered, and that a failure is an answer too.

Whatever a site computes from its patients for somebody else goes through `charged`.
"""

from collections.abc import Callable

from fedcmr.client.ledger import Ledger
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Mechanism
from fedcmr.shared.records import INTERNAL_ERROR


class Refused(Exception):  # noqa: N818
    """The site does not answer this request; the message is one of `fedcmr.shared.records.CODES`."""


def charged(
    ledger: Ledger,
    key: tuple[str, int],
    mechanism: Mechanism,
    work: Callable[[], bytes],
    *,
    cap: float,
    task: str = "",
) -> bytes:
    """The reply to a request, from the ledger or from work that is charged first.

    Guarantees:
        `work` runs at most once for a charge, by one process at a time, and its outcome is final: the same request gets
        the same bytes, or `INTERNAL_ERROR`, for ever. So neither an answer nor a failure can be drawn again, and both
        are covered by the charge as far as `work` is: it must not raise for one patient's sake
        (`fedcmr.client.training` counts a patient whose work fails as the zero vector), and its time and memory must
        not depend on who is there.

    Args:
        ledger: The ledger of the data that `work` reads.
        key: The run's name and the round.
        mechanism: The mechanism of `work`'s release. Epsilon is counted at its delta, the stricter of the request's and
            the policy's, which has let no larger one pass.
        work: Makes the reply, checked and ready to leave.
        cap: Epsilon over the life of the ledger.
        task: What the release is, for the reader of the ledger.

    Raises:
        Refused: With the ledger's code where nothing was charged, or `INTERNAL_ERROR` where the work of this very
            request has failed, now or earlier.
    """
    try:
        with ledger.working():
            reply = ledger.cached_reply(*key, mechanism.release)
            if reply is not None:
                return reply
            ledger.reserve(*key, mechanism.release, mechanism.target_delta, cap, task)
            return _work(ledger, key, work)
    except UserError as error:
        raise Refused(getattr(error, "code", INTERNAL_ERROR)) from error


def _work(ledger: Ledger, key: tuple[str, int], work: Callable[[], bytes]) -> bytes:
    """Work and commit; whatever goes wrong after the charge is one and the same failure."""
    try:
        reply = work()
    except Exception as error:
        try:
            ledger.fail(*key)
        except Exception as unwritten:  # then the charge fails when it is requested again
            raise Refused(INTERNAL_ERROR) from unwritten
        raise Refused(INTERNAL_ERROR) from error
    try:
        ledger.commit(*key, reply)
    except Exception as error:
        raise Refused(INTERNAL_ERROR) from error
    return reply
