"""One round of a federation, without Flower: send a request, check the replies, note what they cost, aggregate.

The mean of the updates is weighted equally: a count of patients would be a release of its own. Whoever drives the
rounds says how sites are reached: Flower's messages (`fedcmr.server.federation.strategy`), or a call in one process, as
in the audits and benchmarks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedcmr.server.federation.senders import Reply
from fedcmr.server.federation.state import FederationState, StudySite, make_request, quorum
from fedcmr.server.federation.validation import Answer, answer_of, drop_duplicates, plausible_norm
from fedcmr.server.settings import Config
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import (
    INTERNAL_ERROR,
    OK,
    SEGMENTER,
    STATISTICS,
    UNCHARGED_CODES,
    UNKNOWN_SITE,
    Request,
    Shapes,
    update_shapes,
)


@dataclass(frozen=True)
class Replies:
    """The replies to a request.

    Attributes:
        num_requested: Sites that the request was sent to.
        replies: The replies that arrived in time, in any order, as they came.
        bytes_down: Bytes of the arrays that were sent, over all sites.
        bytes_up: Bytes of the arrays that came back, over all sites.
    """

    num_requested: int
    replies: Sequence[Reply]
    bytes_down: int = 0
    bytes_up: int = 0


Ask = Callable[[Request, Arrays], Replies]
"""Sends a request with the trainable part to every site that can be reached, and waits for the replies."""


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        request: What was requested of every site.
        answers: The checked replies, in the order of the sites' names.
        replies: The same as they came.
        missing: Number of usable replies that were missing to the quorum; 0 where the round counted.
    """

    request: Request
    answers: Sequence[Answer]
    replies: Replies
    missing: int

    def attendance(self) -> dict[str, Any]:
        """Who replied, who refused with which code, and what was dropped for which reason."""
        return {
            "answered": [answer.site for answer in self.answers if answer.code == OK],
            "refused": {answer.site: answer.code for answer in self.answers if answer.code not in (OK, "")},
            "dropped": {answer.site: answer.dropped for answer in self.answers if answer.dropped is not None},
            "silent": self.replies.num_requested - len(self.answers),
            "missing": self.missing,
        }


def run_round(
    state: FederationState, sites: Mapping[str, StudySite], config: Config, ask: Ask
) -> tuple[FederationState, Round]:
    """The round that follows a state; below the quorum the arrays stay as they were.

    Guarantees:
        No reply is used before it was checked (`fedcmr.server.federation.validation`). Whatever may have been charged
        at a site is among the new state's `releases`, also for a reply that was lost, late or dropped.

    Args:
        state: State after the round before; left as it is.
        sites: Sites of the study by name.
        config: Settings of the study.
        ask: How the sites are reached.

    Returns:
        The new state, whose `rounds` are still those of the old one, and what happened.

    Raises:
        UserError: Every site that got the request refused. The round is not counted.
    """
    request = make_request(config, state, state.server_round + 1, sites)
    replies = ask(request, state.arrays_of(request.task))
    answers = _checked(request, state, sites, replies.replies)
    _raise_if_all_refused(request.server_round, answers, replies.num_requested)
    updates = {answer.site: answer.arrays for answer in answers if answer.arrays is not None}
    missing = max(0, quorum(config.federation, len(sites), request.task) - len(updates))
    after = state
    if missing == 0 and request.task == STATISTICS:
        after = state.after_statistics(updates, sites, request)
    elif missing == 0:
        settings = config.federation
        after = state.after_gradients(updates, settings.ema_decay, settings.trim, request.task)
    releases = _with_releases(state.releases, request, answers, sites, replies.num_requested)
    after = replace(after, server_round=request.server_round, releases=releases)
    return after, Round(request, answers, replies, missing)


def requested_shapes(request: Request, state: FederationState, sites: Mapping[str, StudySite]) -> dict[str, Shapes]:
    """Site -> names and shapes of the update that answers a request."""
    trainable = {name: array.shape for name, array in state.arrays_of(request.task).items()}
    style_size = len(next(iter(state.style_mean.values())))
    return {
        name: update_shapes(request.task, trainable, len(site.vendors), style_size, request.shape_size)
        for name, site in sites.items()
    }


def describe(line: Mapping[str, Any], num_rounds: int, num_sites: int) -> str:
    """A round's line of `metrics.jsonl` in words: "round 3 of 6: 3 of 3 sites, epsilon 5.1, 12 s"."""
    parts = [f"{len(line['answered'])} of {num_sites} sites"]
    parts += [f"{site} refused: {code}" for site, code in line["refused"].items()]
    parts += [f"{site} dropped: {reason}" for site, reason in line["dropped"].items()]
    parts += [f"{line['silent']} silent"] if line["silent"] else []
    parts += [f"{line['missing']} short of the quorum, nothing changed"] if line["missing"] else []
    epsilon = "no privacy" if line["epsilon"] is None else f"epsilon {line['epsilon']:.2f}"
    of_what = " (segmenter)" if line["task"] == SEGMENTER else ""
    return f"round {line['round']} of {num_rounds}{of_what}: {', '.join(parts)}, {epsilon}, {line['elapsed_s']:.0f} s"


def _checked(
    request: Request, state: FederationState, sites: Mapping[str, StudySite], replies: Sequence[Reply]
) -> list[Answer]:
    """The replies as answers, in the order of the sites' names."""
    shapes = requested_shapes(request, state, sites)
    max_norms = {}
    for site, facts in sites.items():
        num_parameters = sum(int(np.prod(shape)) for shape in shapes[site].values())
        divisor = min(facts.vendors.values()) if request.task == STATISTICS else facts.nominal_patients
        max_norms[site] = plausible_norm(request, num_parameters, divisor)
    answers = [answer_of(reply, max_norms, shapes.__getitem__) for reply in replies]
    return sorted(drop_duplicates(answers), key=lambda answer: answer.site)


def _raise_if_all_refused(server_round: int, answers: Sequence[Answer], num_requested: int) -> None:
    """End the run where another round cannot help; a failure under a charge concerns this round alone."""
    refusals = [answer for answer in answers if answer.code not in (OK, "", INTERNAL_ERROR)]
    if refusals and len(refusals) == num_requested:
        codes = ", ".join(f"{answer.site}: {answer.code}" for answer in refusals)
        raise UserError(f"all sites refused round {server_round} ({codes}): see site.yaml and errors.log at each site")


def _with_releases(
    releases: Mapping[str, list[dict[str, Any]]],
    request: Request,
    answers: Sequence[Answer],
    sites: Mapping[str, StudySite],
    num_requested: int,
) -> dict[str, list[dict[str, Any]]]:
    """The releases so far and this round's: one of every site, unless the site reported that it refused.

    A lost, late or broken reply may have been charged. A request without a reply that names its site counts for every
    site that has not replied.
    """
    found = {site: list(entries) for site, entries in releases.items()}
    code_of = {a.site: a.code or f"dropped-{a.dropped}" for a in answers if a.site != UNKNOWN_SITE}
    anonymous_refusals = sum(a.site == UNKNOWN_SITE and a.code in UNCHARGED_CODES for a in answers)
    all_heard = len(code_of) + anonymous_refusals == num_requested
    for site in sites:
        if site in code_of or not all_heard:
            code = code_of.get(site, "no-answer")
            found.setdefault(site, []).append(
                {
                    "round": request.server_round,
                    "task": request.task,
                    "code": code,
                    "charged": code not in UNCHARGED_CODES,
                    "release": asdict(request.mechanism.release),
                }
            )
    return found
