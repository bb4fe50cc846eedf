"""Federation: what our rounds add to Flower's FedAvg.

Round 1 asks each site for the private moments of its appearance codes, the others for private gradient steps on the
part of the generator that the study's rung trains (`fedcmr.server.federation.adapters`). Weights are equal: a count of
patients would be a release of its own. Every reply is checked before any maths, and the state is saved after every
round, so that an interruption loses one round at most.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedcmr.server.federation.participation import participation, prior_styles, sentences
from fedcmr.server.federation.senders import Nodes, Reply, read_nodes, reply_of
from fedcmr.server.federation.state import (
    FederationState,
    StudySite,
    check_delta,
    initial_state,
    make_request,
    quorum,
    read_study,
)
from fedcmr.server.federation.validation import Answer, answer_of, drop_duplicates, plausible_norm
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config, FederationConfig
from fedcmr.shared import checkpoint
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import Release
from fedcmr.shared.progress import console
from fedcmr.shared.records import (
    ARRAYS,
    CONFIG,
    INTERNAL_ERROR,
    MOMENTS,
    OK,
    UNCHARGED_CODES,
    UNKNOWN_SITE,
    EvaluationRequest,
    Request,
    encode,
    pack_rehearsal,
    pack_rehearsed_evaluation,
    pack_request,
    update_shapes,
)

NO_ANSWER = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""What Flower says in the place of a site that was not heard from in time: it is silent, as one that says nothing."""
PATIENCE = 2
"""Rounds in a row that may miss their quorum: an honest site can miss one, after a crash of its own for example."""
NODE_POLL_S = 1.0
NODE_WAIT_S = 120.0
"""How long a round waits for further sites to connect once there is one."""


class EqualWeightFedAvg(FedAvg):
    """FedAvg with equal weights, checked replies, a quorum, moments per vendor, an average over rounds, and accounting.

    Attributes:
        state: Changed by `aggregate_train`.
        answers: The checked replies of the last round.
        missing: How many usable answers the last round was short of its quorum; 0 where it counted.
    """

    def __init__(
        self,
        state: FederationState,
        sites: Mapping[str, StudySite],
        settings: FederationConfig,
        nodes: Nodes | None = None,
    ):
        super().__init__()
        self.state = state
        self.sites = sites
        self.settings = settings
        self.nodes = nodes
        self.answers: list[Answer] = []
        self.missing = 0
        self._num_asked = 0
        self._request: Request | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message to every connected site; one that is fetched after the timeout has expired and costs nothing.

        Raises:
            UserError: Fewer sites than the quorum are connected: their answers would be charged for nothing.
        """
        timeout_s = self.settings.reply_timeout_s
        self._request = Request.from_config(config)
        needed = quorum(self.settings, len(self.sites), self._request.task)
        node_ids = wait_for_nodes(grid, needed, needed, timeout_s, self.nodes)
        self._num_asked = len(node_ids)
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        return [
            Message(
                content, dst_node_id=node_id, message_type=MessageType.TRAIN, ttl=timeout_s, group_id=str(server_round)
            )
            for node_id in node_ids
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, note what they cost, and apply the usable ones; below the quorum the arrays stay.

        Raises:
            UserError: Every site that was asked refused. The round is not counted.
        """
        request = self._request
        assert request is not None, "configure_train comes first"
        self.answers = self._checked(request, replies)
        self._raise_if_all_refused(server_round)
        updates = {answer.site: answer.arrays for answer in self.answers if answer.arrays is not None}
        self._note_releases(request)
        self.missing = max(0, quorum(self.settings, len(self.sites), request.task) - len(updates))
        if self.missing == 0 and request.task == MOMENTS:
            self.state.apply_moments(updates, self.sites, request)
        elif self.missing == 0:
            self.state.apply_gradients(updates, self.settings.ema_decay, self.settings.trim)
        self.state.server_round = server_round
        return encode(self.state.arrays), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: a figure measured on a site's patients would be a release of its own."""
        return []

    def _checked(self, request: Request, replies: Iterable[Message]) -> list[Answer]:
        """The replies as answers, in the order of the sites' names."""
        code_size = len(next(iter(self.state.code_mean.values())))
        trainable = {name: array.shape for name, array in self.state.arrays.items()}
        shapes = {
            site: update_shapes(request.task, trainable, len(facts.vendors), code_size)
            for site, facts in self.sites.items()
        }
        max_norms = {}
        for site, facts in self.sites.items():
            num_parameters = sum(int(np.prod(shape)) for shape in shapes[site].values())
            divisor = min(facts.vendors.values()) if request.task == MOMENTS else facts.nominal_patients
            max_norms[site] = plausible_norm(request, num_parameters, divisor)
        answers = [answer_of(reply, max_norms, shapes.__getitem__) for reply in received(replies, self.nodes)]
        return sorted(drop_duplicates(answers), key=lambda answer: answer.site)

    def _raise_if_all_refused(self, server_round: int) -> None:
        """End the run where going on cannot help: a failure under a charge is of this round alone."""
        refusals = [answer for answer in self.answers if answer.code not in (OK, "", INTERNAL_ERROR)]
        if refusals and len(refusals) == self._num_asked:
            codes = ", ".join(f"{answer.site}: {answer.code}" for answer in refusals)
            raise UserError(
                f"all sites refused round {server_round} ({codes}): see site.yaml and errors.log at each site"
            )

    def _note_releases(self, request: Request) -> None:
        """Count a site's release unless the site said that it refused.

        A lost, late or broken reply may have been charged. Where a request stayed without an answer that names its
        site, it counts for every site that was not heard from.
        """
        code_of = {a.site: a.code or f"dropped-{a.dropped}" for a in self.answers if a.site != UNKNOWN_SITE}
        anonymous_refusals = sum(a.site == UNKNOWN_SITE and a.code in UNCHARGED_CODES for a in self.answers)
        all_heard = len(code_of) + anonymous_refusals == self._num_asked
        for site in self.sites:
            if site in code_of or not all_heard:
                code = code_of.get(site, "no-answer")
                self.state.releases.setdefault(site, []).append(
                    {
                        "round": request.server_round,
                        "task": request.task,
                        "code": code,
                        "charged": code not in UNCHARGED_CODES,
                        "release": asdict(request.release),
                    }
                )


def federate(grid: Grid, run: RunFolder, config: Config, prior: Prior) -> None:
    """Run the rounds that are still to do, then write the shared generator.

    Writes `checkpoints/round_NNNN.safetensors` after every round (0: the start), a line of `metrics.jsonl` per round
    and `generator.safetensors`. A run that was interrupted goes on from its newest readable checkpoint, with the same
    run id, so that no site is charged twice for a round.

    Raises:
        UserError: The delta is too large for a site, all sites refused, fewer connected than the quorum, the study has
            fewer sites than its quorum, or no round had enough usable answers.
    """
    sites, settings, nodes = read_study(run), config.federation, read_nodes(run)
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
        run.log(state.choice)
    if state.prior_sha256 != prior.sha256:
        raise UserError(f"{folder} belongs to another prior: give that one as 'prior', or a new run folder")
    logged = {line["round"] for line in run.rounds()}
    for metrics in state.rounds:  # an interruption between a checkpoint and its line
        if metrics["round"] not in logged:
            run.metric(metrics)
    num_rounds = state.num_rounds(config)
    if state.server_round < num_rounds:
        wait_for_nodes(grid, len(sites), quorum(settings, len(sites), MOMENTS), settings.reply_timeout_s, nodes)
    strategy = EqualWeightFedAvg(state, sites, settings, nodes)
    for server_round in range(state.server_round + 1, num_rounds + 1):
        started = time.monotonic()
        request = make_request(config, state, server_round, sites)
        arrays = encode(state.arrays)
        messages = list(strategy.configure_train(server_round, arrays, request.to_config(), grid))
        replies = list(grid.send_and_receive(messages, timeout=settings.reply_timeout_s))
        strategy.aggregate_train(server_round, replies)
        metrics = {
            "stage": "federation",
            "round": server_round,
            "rung": state.rung,
            **summarise(strategy.answers, len(messages)),
            "missing": strategy.missing,
            "bytes_down": _num_bytes(arrays) * len(messages),
            "bytes_up": sum(_num_bytes(reply.content.get(ARRAYS)) for reply in replies if reply.has_content()),
            "elapsed_s": round(time.monotonic() - started, 3),
            "epsilon": max_epsilon(state, config),
        }
        state.rounds.append(metrics)
        state.save(folder)
        run.metric(metrics)
        run.log(describe(metrics, num_rounds, len(sites)))
        _end_below_the_quorum(state, sites, needed)
    if not any(entry["answered"] and not entry.get("missing") for entry in state.rounds):
        reasons = {reason for entry in state.rounds for key in ("refused", "dropped") for reason in entry[key].values()}
        if any(entry.get("missing") and entry["answered"] for entry in state.rounds):
            reasons.add("fewer answers than the quorum")
        why = ", ".join(sorted(reasons)) or "no answer"
        raise UserError(
            f"no site gave a usable update in {num_rounds} rounds ({why}): mend it and take a new run folder"
        )
    vendors = {site: tuple(facts.vendors) for site, facts in sites.items()}
    state.publish(run.path / "generator.safetensors", vendors, config.privacy.target_delta)
    published, _ = checkpoint.load(run.path / "generator.safetensors")
    for sentence in sentences(participation(state.rounds, sites), prior_styles(published)):
        run.log(sentence)


def _end_below_the_quorum(state: FederationState, sites: Mapping[str, StudySite], needed: int) -> None:
    """Stop asking where it cannot help: the sites that do answer would be charged for rounds that change nothing.

    Raises:
        UserError: `PATIENCE` rounds in a row fell short of the quorum; the next run goes on with the round after them.
    """
    last = state.rounds[-PATIENCE:]
    if len(last) == PATIENCE and all(line.get("missing") for line in last):
        why = " ".join(sentences(participation(last, sites)))
        raise UserError(
            f"{PATIENCE} rounds in a row had fewer usable answers than the quorum of {needed}. {why} Mend "
            "it, then the same command goes on; a new run may set federation.min_sites"
        )


def ask_evaluation(
    grid: Grid, arrays: Arrays, request: EvaluationRequest, num_sites: int, timeout_s: float, nodes: Nodes | None
) -> list[Reply]:
    """Send a model to every site that is connected, after a short wait for all; returns what came back in time.

    Args:
        grid: Where the sites are.
        arrays: The model.
        request: What is asked of every site.
        num_sites: Of the study.
        timeout_s: For the answers.
        nodes: What `read_nodes` returned.
    """
    node_ids = wait_for_nodes(grid, num_sites, 0, timeout_s, nodes)
    content = pack_request(arrays, request)
    messages = [
        Message(content, dst_node_id=node_id, message_type=MessageType.EVALUATE, ttl=timeout_s, group_id="evaluation")
        for node_id in node_ids
    ]
    return received(grid.send_and_receive(messages, timeout=timeout_s), nodes)


def ask_rehearsal(
    grid: Grid,
    node_ids: Iterable[int],
    arrays: Arrays,
    request: Request,
    planned: Sequence[Release],
    timeout_s: float,
    nodes: Nodes | None,
) -> list[Reply]:
    """Let these sites rehearse a request; returns what came back in time.

    It travels as a query: what does not know rehearsals has no way to take it for a round.
    """
    return _query(grid, node_ids, pack_rehearsal(arrays, request, planned), timeout_s, nodes)


def ask_rehearsed_evaluation(
    grid: Grid,
    node_ids: Iterable[int],
    arrays: Arrays,
    request: EvaluationRequest,
    timeout_s: float,
    nodes: Nodes | None,
) -> list[Reply]:
    """`ask_rehearsal` for a model that the sites shall judge."""
    return _query(grid, node_ids, pack_rehearsed_evaluation(arrays, request), timeout_s, nodes)


def _query(
    grid: Grid, node_ids: Iterable[int], content: RecordDict, timeout_s: float, nodes: Nodes | None
) -> list[Reply]:
    messages = [
        Message(content, dst_node_id=node_id, message_type=MessageType.QUERY, ttl=timeout_s, group_id="rehearsal")
        for node_id in node_ids
    ]
    return received(grid.send_and_receive(messages, timeout=timeout_s), nodes)


def received(messages: Iterable[Message], nodes: Nodes | None) -> list[Reply]:
    """What Flower brought back, each with whose it is; without the sites that it heard nothing from."""
    return [
        reply_of(message.metadata.src_node_id, message.content, "", nodes)
        if message.has_content()
        else reply_of(message.metadata.src_node_id, None, message.error.reason or "", nodes)
        for message in messages
        if message.has_content() or message.error.code not in NO_ANSWER
    ]


def wait_for_nodes(
    grid: Grid, num_wanted: int, num_needed: int, timeout_s: float, nodes: Nodes | None = None
) -> list[int]:
    """The connected nodes of the study: at least `num_wanted`, or after `NODE_WAIT_S` those that are there if enough.

    Args:
        grid: Where they connect.
        num_wanted: Worth a short wait.
        num_needed: With fewer the study does not go on; at most `num_wanted`.
        timeout_s: For these.
        nodes: Those of the study: what another one answered would be charged and dropped. None where there is no list.

    Raises:
        UserError: Fewer than `num_needed` connected within `timeout_s`.
    """
    started, told = time.monotonic(), -1
    while len(node_ids := sorted(n for n in grid.get_node_ids() if nodes is None or n in nodes)) < num_wanted:
        waited = time.monotonic() - started
        if len(node_ids) >= num_needed and waited > NODE_WAIT_S:
            break
        if waited > timeout_s and len(node_ids) < num_needed:
            there = f"{len(node_ids)} of the {num_needed} sites it takes" if node_ids else "no site"
            raise UserError(f"{there} connected within {timeout_s:.0f} s: start the sites, then the same command again")
        if len(node_ids) != told:
            told = len(node_ids)
            console.print(f"waiting for sites: {told} of {num_wanted} connected")
        time.sleep(NODE_POLL_S)
    return node_ids


def summarise(answers: list[Answer], num_asked: int) -> dict[str, Any]:
    """Who answered, who refused with which code, and what was dropped for which reason."""
    return {
        "answered": [answer.site for answer in answers if answer.code == OK],
        "refused": {answer.site: answer.code for answer in answers if answer.code not in (OK, "")},
        "dropped": {answer.site: answer.dropped for answer in answers if answer.dropped is not None},
        "silent": num_asked - len(answers),
    }


def describe(metrics: Mapping[str, Any], num_rounds: int, num_sites: int) -> str:
    """A round in one line: "round 3 of 6: 3 of 3 sites, epsilon 5.1, 12 s"."""
    parts = [f"{len(metrics['answered'])} of {num_sites} sites"]
    parts += [f"{site} refused: {code}" for site, code in metrics["refused"].items()]
    parts += [f"{site} dropped: {reason}" for site, reason in metrics["dropped"].items()]
    parts += [f"{metrics['silent']} silent"] if metrics["silent"] else []
    parts += [f"{metrics['missing']} short of the quorum, nothing changed"] if metrics["missing"] else []
    epsilon = "no privacy" if metrics["epsilon"] is None else f"epsilon {metrics['epsilon']:.2f}"
    return f"round {metrics['round']} of {num_rounds}: {', '.join(parts)}, {epsilon}, {metrics['elapsed_s']:.0f} s"


def max_epsilon(state: FederationState, config: Config) -> float | None:
    """The largest epsilon of any site in this run so far; None without privacy."""
    if state.plan is None:
        return None
    return max((value for value, _ in state.epsilons(config.privacy.target_delta).values()), default=0.0)


def _num_bytes(record: Any) -> int:
    """Bytes of the arrays in a record."""
    return sum(len(array.data) for array in record.values()) if isinstance(record, ArrayRecord) else 0
