"""The sites' replies to a rehearsal, checked: one outcome for each site of the study."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from fedcmr.server.federation.senders import Reply
from fedcmr.shared.records import ARRAYS, CODES, OK, REHEARSAL, UNKNOWN_SITE, Shapes, decode

NO_ANSWER, DROPPED = "no answer", "not usable"


class Outcome(NamedTuple):
    """A site's checked reply.

    Attributes:
        code: One of `CODES`, `NO_ANSWER`, `DROPPED`, or why a reply has no content to check
            (`fedcmr.server.federation.senders.Reply`).
        seconds: With "ok": duration of the work on invented patients in seconds.
        form: With "ok": the form of the sums over test patients; None for an update.
    """

    code: str
    seconds: float | None = None
    form: str | None = None


def outcomes(
    replies: Iterable[Reply], shapes: Mapping[str, Shapes], forms: Collection[str | None] = (None,)
) -> tuple[dict[str, Outcome], list[str]]:
    """Every site of the study with its outcome, and the codes of the replies that belong to no site.

    Args:
        replies: All replies; several of one site are not usable.
        shapes: See `check_rehearsal`.
        forms: See `check_rehearsal`.
    """
    found: dict[str, list[Outcome]] = {}
    for sent in replies:
        name, outcome = check_rehearsal(sent, shapes, forms)
        found.setdefault(name, []).append(outcome)
    unnamed = [outcome.code for outcome in found.pop(UNKNOWN_SITE, [])]
    single = {name: answers[0] if len(answers) == 1 else Outcome(DROPPED) for name, answers in found.items()}
    return {name: single.get(name, Outcome(NO_ANSWER)) for name in shapes}, unnamed


def check_rehearsal(
    sent: Reply, shapes: Mapping[str, Shapes], forms: Collection[str | None] = (None,)
) -> tuple[str, Outcome]:
    """One reply, checked: the site or "unknown", and its outcome.

    Args:
        sent: The reply and its sender.
        shapes: Site of the study -> names and shapes of the arrays that it would send.
        forms: Forms that the reply may have.
    """
    if sent.content is None:
        return sent.site or UNKNOWN_SITE, Outcome(sent.code)
    content = sent.content
    reply = content.get(REHEARSAL)
    if not isinstance(reply, Mapping) or reply.get("code") not in CODES:
        return sent.site or UNKNOWN_SITE, Outcome(DROPPED)
    site, code = sent.site or str(reply.get("site")), str(reply["code"])
    if site not in shapes:
        return UNKNOWN_SITE, Outcome(code)
    if code != OK:
        return site, Outcome(code if set(reply) == {"site", "code"} and set(content) == {REHEARSAL} else DROPPED)
    seconds, form = reply.get("seconds"), reply.get("form")
    try:
        arrays = decode(content[ARRAYS], shapes[site])
    except (KeyError, TypeError, ValueError):
        return site, Outcome(DROPPED)
    usable = isinstance(seconds, float) and 0 <= seconds < 1e9 and form in forms
    if not usable or any(array.any() for array in arrays.values()):
        return site, Outcome(DROPPED)
    return site, Outcome(OK, seconds, form)
