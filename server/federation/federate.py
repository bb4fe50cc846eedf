"""The course of a federation: its rounds one after another, each saved, and the shared generator at the end.

Round 1 requests the private statistics of each site's styles, the others private gradient steps on the part of the
generator that the study's adapter trains (`fedcmr.server.federation.adapters`), and after these, where
`federation.segmenter_rounds` says so, private gradient steps on a part of the public segmenter. The state is saved
after every round, so that an interruption loses one round at most.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from fedcmr.server.federation.expectation import expected
from fedcmr.server.federation.participation import participation, prior_styles, sentences
from fedcmr.server.federation.round import describe, run_round
from fedcmr.server.federation.senders import read_nodes
from fedcmr.server.federation.state import (
    FEDERATED_SEGMENTER_NAME,
    FederationState,
    StudySite,
    check_delta,
    initial_state,
    quorum,
    read_study,
)
from fedcmr.server.federation.strategy import Grid, SitesByFlower
from fedcmr.server.run_folder import RunFolder
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.records import STATISTICS
from fedcmr.shared.tasks.segmentation.segmenter import public_sha256

PATIENCE = 2
"""Rounds in a row that may miss their quorum: an honest site can miss one, for example after a crash."""


def federate(grid: Grid, run: RunFolder, prior: Prior) -> None:
    """Run the rounds that are still to do, then write the shared generator.

    Writes `checkpoints/round_NNNN.safetensors` after every round (0: the start), a line of `metrics.jsonl` per round
    and `generator.safetensors`; where there are rounds for the segmenter, also `federated_segmenter.safetensors`. An
    interrupted run resumes from its newest readable checkpoint, with the same run id, so that no site is charged twice
    for a round.

    Raises:
        UserError: The delta is too large for a site, all sites refused, fewer connected than the quorum, the study has
            fewer sites than its quorum, or no round had enough usable replies.
    """
    config, sites = run.config, read_study(run)
    settings = config.federation
    needed = quorum(settings, len(sites))
    if needed > len(sites):
        raise UserError(
            f"federation.min_sites={settings.min_sites} and federation.trim={settings.trim} need more answers than the "
            f"study has sites, {len(sites)}: lower them"
        )
    check_delta(config.privacy, {name: facts.nominal_patients for name, facts in sites.items()})
    folder = run.path / "checkpoints"
    state = FederationState.load_newest(folder)
    if state is None:
        state = initial_state(config, prior, sites)
        state.save(folder)
        run.log(state.described(config))
        for sentence in expected(state, config, sites):
            run.log(sentence)
    if state.prior_sha256 != prior.sha256:
        raise UserError(f"{folder} belongs to another prior: give that one as 'prior', or a new run folder")
    if settings.segmenter_rounds and state.segmenter_sha256 != public_sha256():
        raise UserError(f"{folder} belongs to another public segmenter than this version's: take a new run folder")
    logged = {line["round"] for line in run.rounds()}
    for line in state.rounds:  # an interruption between a checkpoint and its line
        if line["round"] not in logged:
            run.metric(line)
    num_rounds = state.num_rounds(config)
    connected = SitesByFlower(grid, settings, len(sites), read_nodes(run))
    if state.server_round < num_rounds:
        connected.wait(len(sites), quorum(settings, len(sites), STATISTICS))
    while state.server_round < num_rounds:
        started = time.monotonic()
        state, happened = run_round(state, sites, config, connected.train)
        line = {
            "stage": "federation",
            "round": state.server_round,
            "task": happened.request.task,
            "adapter": state.adapter,
            **happened.attendance(),
            "bytes_down": happened.replies.bytes_down,
            "bytes_up": happened.replies.bytes_up,
            "elapsed_s": round(time.monotonic() - started, 3),
            "epsilon": state.max_epsilon(config.privacy.target_delta),
        }
        state = replace(state, rounds=[*state.rounds, line])
        state.save(folder)
        run.metric(line)
        run.log(describe(line, num_rounds, len(sites)))
        _end_below_the_quorum(state, sites, needed)
    if not any(line["answered"] and not line.get("missing") for line in state.rounds):
        raise UserError(
            f"no site gave a usable update in {num_rounds} rounds ({_why_nothing(state)}): fix it and take a new run "
            "folder"
        )
    vendors = {site: tuple(facts.vendors) for site, facts in sites.items()}
    if settings.segmenter_rounds:
        state.publish_segmenter(run.path / FEDERATED_SEGMENTER_NAME, config)
    published = state.publish(run.path / "generator.safetensors", vendors, config.privacy.target_delta)
    for sentence in sentences(participation(state.rounds, sites), prior_styles(published)):
        run.log(sentence)


def _why_nothing(state: FederationState) -> str:
    """The codes and reasons of all rounds, where none of them counted."""
    reasons = {reason for line in state.rounds for key in ("refused", "dropped") for reason in line[key].values()}
    if any(line.get("missing") and line["answered"] for line in state.rounds):
        reasons.add("fewer answers than the quorum")
    return ", ".join(sorted(reasons)) or "no answer"


def _end_below_the_quorum(state: FederationState, sites: Mapping[str, StudySite], needed: int) -> None:
    """Stop where more rounds cannot help: the sites that reply would be charged for rounds that change nothing.

    Raises:
        UserError: `PATIENCE` rounds in a row fell short of the quorum; the next run resumes with the round after them.
    """
    last = state.rounds[-PATIENCE:]
    if len(last) == PATIENCE and all(line.get("missing") for line in last):
        why = " ".join(sentences(participation(last, sites)))
        raise UserError(
            f"{PATIENCE} rounds in a row had fewer usable answers than the quorum of {needed}. {why} Fix "
            "it, then the same command resumes; a new run may set federation.min_sites"
        )
