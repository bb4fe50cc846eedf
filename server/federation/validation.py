"""Checks of every reply before it is used: a bad one is dropped with a reason and the round continues.

The checks bound what one faulty or hostile site can do to a round; they do not make the mean robust against an update
that is wrong but plausible.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcmr.server.federation.senders import Reply
from fedcmr.shared.records import ARRAYS, CODES, OK, REPLY, STATISTICS, UNKNOWN_SITE, Request, Shapes, decode

NORM_SLACK = 10.0
"""Factor by which an update may exceed its expected norm: a site may hold more patients than its nominal number."""


@dataclass(frozen=True)
class Answer:
    """One checked reply.

    Attributes:
        site: A site of the study, or "unknown" where neither the sender's key nor the reply names one.
        code: The site's own code, "ok" or a refusal; "" where the reply is dropped.
        arrays: The update; present if and only if the code is "ok".
        dropped: Why a reply cannot be used, whatever its code.
    """

    site: str = UNKNOWN_SITE
    code: str = ""
    arrays: dict[str, NDArray[np.float32]] | None = None
    dropped: str | None = None


def answer_of(reply: Reply, max_norms: Mapping[str, float], shapes_of: Callable[[str], Shapes]) -> Answer:
    """Check one reply and name the site whose key sent it, where that is known. Arguments as for `check_reply`."""
    site = reply.site or UNKNOWN_SITE
    if reply.content is None:
        return Answer(site, reply.code) if reply.code in CODES else Answer(site, dropped=reply.code)
    answer = check_reply(reply.content, max_norms, shapes_of)
    return answer if reply.site is None else replace(answer, site=site)


def check_reply(
    content: Mapping[str, Any], max_norms: Mapping[str, float], shapes_of: Callable[[str], Shapes]
) -> Answer:
    """Check one reply's content.

    Args:
        content: The records of the reply, as they came.
        max_norms: Site of the study -> L2 norm above which its update is implausible; see `plausible_norm`.
        shapes_of: Names and shapes of the update that was requested from a site of the study.
    """
    reply = content.get(REPLY)
    if not isinstance(reply, Mapping) or set(reply) != {"site", "code"}:
        return Answer(dropped="keys")
    site, code = reply["site"], reply["code"]
    if not isinstance(site, str) or not isinstance(code, str) or code not in CODES:
        return Answer(dropped="code")
    if site not in max_norms and (site, code == OK) != (UNKNOWN_SITE, False):
        return Answer(dropped="site-not-in-study")
    if set(content) != ({REPLY, ARRAYS} if code == OK else {REPLY}):
        return Answer(site, dropped="keys")
    if code != OK:
        return Answer(site, code)
    record = content[ARRAYS]
    try:
        arrays = decode(record if isinstance(record, Mapping) else {}, shapes_of(site))
    except ValueError as reason:
        return Answer(site, dropped=str(reason))
    if not update_norm(arrays) <= max_norms[site]:
        return Answer(site, dropped="norm")
    return Answer(site, code, arrays)


def drop_duplicates(answers: list[Answer]) -> list[Answer]:
    """Drop all replies of a site that replied more than once: none of them can be trusted."""
    sites = [answer.site for answer in answers if answer.site != UNKNOWN_SITE]
    return [
        Answer(answer.site, dropped="duplicate-site") if sites.count(answer.site) > 1 else answer for answer in answers
    ]


def plausible_norm(request: Request, num_parameters: int, nominal_patients: int) -> float:
    """The largest L2 norm an honest private update is expected to have, with slack; infinite without privacy.

    Gradients: `local_steps` steps of `learning_rate`, each at most the clip C plus noise of norm
    sigma C sqrt(D) / (q N). Statistics: mean and mean square of style vectors of norm at most B, with their noise; the
    noise of the mean enters the mean square twice, multiplied by the mean and by itself. For a site with several
    vendors pass the smallest nominal number: its row has the most noise.
    """
    if not request.private:
        return math.inf
    norm = request.max_grad_norm
    noise = request.noise_multiplier * math.sqrt(num_parameters) / (request.sample_rate * nominal_patients)
    if request.task == STATISTICS:
        return NORM_SLACK * (norm * (1 + noise) + norm**2 * (1 + noise) ** 2)
    return NORM_SLACK * request.local_steps * request.learning_rate * norm * (1 + noise)


def update_norm(arrays: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm over all arrays, in float64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))
