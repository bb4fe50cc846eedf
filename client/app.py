"""ClientApp: unpack, ask the site's policy and ledger, train, pack.

Whatever happens, only the `pack_` functions of `fedcmr.shared.records` make an answer: a private update, a table of
sums over test patients, zeros in the shape of either, or a code. What went wrong is written to `errors.log` in the
site's own folder.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp

from fedcmr.client import error_log
from fedcmr.client.code_hash import code_sha256
from fedcmr.client.evaluation_patients import check_test_folder
from fedcmr.client.ledger import Ledger, dataset_of
from fedcmr.client.policy import SiteSettings, load_site, refusal
from fedcmr.client.rehearsal import Rehearsed
from fedcmr.client.release import Refused, charged
from fedcmr.client.request_time import estimated_seconds
from fedcmr.client.subject import subject_of
from fedcmr.client.training import Execution, LocalSteps
from fedcmr.shared.checkpoint import Arrays, from_bytes, to_bytes
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import (
    ARRAYS,
    CONFIG,
    INTERNAL_ERROR,
    OK,
    PLAIN,
    PLANNED,
    PRIVATE,
    REHEARSAL,
    REHEARSED_EVALUATION,
    UNKNOWN_SITE,
    EvaluationRequest,
    Request,
    Shapes,
    arrays_sha256,
    decode,
    pack_rehearsal_reply,
    pack_rehearsed_sums,
    pack_reply,
    pack_sums,
    read_planned,
)
from fedcmr.shared.site_facts import facts_line

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one request of the server."""
    return Message(answer(message, context.node_config, context.run_config), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a model of the server's on the site's own test patients."""
    return Message(answer(message, context.node_config, context.run_config, evaluation=True), reply_to=message)


@app.query()
def rehearse(message: Message, context: Context) -> Message:
    """Rehearse one request of the server."""
    content = rehearsal(message.content, context.node_config, context.run_config)
    return Message(content, reply_to=message)


def answer(message: Message, node_config: UserConfig, run_config: UserConfig, evaluation: bool = False) -> RecordDict:
    """The content of the reply; never raises, and never holds more than `pack_reply` or `pack_sums` lets out."""
    name, folder = UNKNOWN_SITE, None
    try:
        site = _load_site(node_config, run_config)
        name, folder = site.name, site.folder
        device = pick_device(str(node_config.get("device", "auto")))
        if evaluation:
            return pack_sums(name, *respond_evaluation(site, message.content, device))
        arrays, shapes = respond(site, message.content, device)
        return pack_reply(name, OK, arrays, shapes)
    except Refused as refused:
        code = str(refused)
        _log_locally(folder, code)
    except Exception:
        code = INTERNAL_ERROR
        _log_locally(folder, code)
    return pack_reply(name, code)


def rehearsal(content: RecordDict, node_config: UserConfig, run_config: UserConfig) -> RecordDict:
    """The content of the reply to a rehearsal; never raises.

    It holds no more than `pack_rehearsal_reply` or `pack_rehearsed_sums` lets out.
    """
    name, folder = UNKNOWN_SITE, None
    try:
        site = _load_site(node_config, run_config)
        name, folder = site.name, site.folder
        device = pick_device(str(node_config.get("device", "auto")))
        if REHEARSED_EVALUATION in content:
            rehearsed = Rehearsed([])
            request = RecordDict({CONFIG: content[REHEARSED_EVALUATION], ARRAYS: content.get(ARRAYS, ArrayRecord())})
            form, _, sums_shapes = respond_evaluation(site, request, device, rehearsed)
            return pack_rehearsed_sums(name, form, sums_shapes, rehearsed.seconds)
        try:
            rehearsed = Rehearsed(read_planned(content[PLANNED]))
            request = RecordDict({CONFIG: content[REHEARSAL], ARRAYS: content[ARRAYS]})
        except (KeyError, TypeError, ValueError):
            raise Refused("bad-request") from None
        _, shapes = respond(site, request, device, rehearsed)
        return pack_rehearsal_reply(name, OK, shapes, rehearsed.seconds)
    except Refused as refused:
        code = str(refused)
        _log_locally(folder, f"rehearsal: {code}")
    except Exception:
        code = INTERNAL_ERROR
        _log_locally(folder, f"rehearsal: {code}")
    return pack_rehearsal_reply(name, code)


def respond(
    site: SiteSettings, content: RecordDict, device: torch.device, rehearsed: Rehearsed | None = None
) -> tuple[Arrays, Shapes]:
    """Answer a request as far as the site's policy and ledger allow.

    The order is part of the guarantee: the ledger is charged before training, and what leaves is what was committed.
    Before the charge nothing is computed from patients but what does not depend on the request: that their folder can
    be read ("data-unreadable" says that they cannot, until the site repairs them) and that they are at least
    `min_patients`; for gradients, those of them who are drawn whole in a slice at least, and for the segmenter those of
    whom people drew something.

    Where it is `rehearsed`, nothing is charged, and after the last check invented patients take the place of the real
    ones: see `fedcmr.client.rehearsal`.

    Returns:
        The update, and the names and shapes that it may have.

    Raises:
        Refused: With the code to send instead.
    """
    try:
        request = Request.from_config(content[CONFIG])
    except (KeyError, TypeError, ValueError):
        raise Refused("bad-request") from None
    _check_agreed(site, request.sites)
    try:
        subject = subject_of(site, request)
        dataset = dataset_of(site.data_path)
    except Exception as error:  # of whatever kind: one code for a folder that the site has to repair
        raise Refused("data-unreadable") from error
    mechanism = request.mechanism.at(site.nominal_patients)
    code = refusal(
        site.policy,
        mechanism,
        num_patients=subject.num_patients,
        server_round=request.server_round,
        num_views=request.num_views,
    )
    if code is not None:
        raise Refused(code)
    if subject.sha256 != request.prior_sha256:
        raise Refused("prior-mismatch")
    shapes = subject.shapes
    try:
        start = decode(content[ARRAYS], subject.trainable)
    except (KeyError, ValueError):
        raise Refused("bad-request") from None

    steps, execution = LocalSteps.of(request), Execution(device, site.policy.max_seconds)
    if subject.learner is not None:
        seconds = estimated_seconds(site.folder, subject.learner, subject.part, mechanism, steps, execution)
        _check_time(site, seconds)

    def update() -> Arrays:
        return subject.update(rehearsed is not None, start, mechanism, steps, execution, _teller(site.folder))

    def reply() -> bytes:
        arrays = update()
        pack_reply(site.name, OK, arrays, shapes)  # what may not leave is a failure of the work
        return to_bytes(arrays)

    ledger = Ledger(site.ledger_path, site.replica_path, dataset, asdict(site.policy))
    cap = site.policy.max_epsilon
    if rehearsed is not None:
        charges = ledger if mechanism.private else None
        delta = mechanism.target_delta
        return rehearsed.work(charges, update, delta=delta, cap=cap, task=_in_words(request)), shapes
    if not mechanism.private:
        return update(), shapes
    key = (request.run_id, request.server_round)
    return from_bytes(charged(ledger, key, mechanism, reply, cap=cap, task=_in_words(request))), shapes


def _in_words(request: Request) -> str:
    """What a round asks for, for the ledger's readers: that shapes leave too is said where it is charged."""
    return f"{request.task} of style and shape" if request.with_shape else request.task


def _teller(folder: Path) -> Callable[[], None]:
    """Tells the site's own people of the first patient of a request whose work fails."""
    told = threading.Event()

    def tell() -> None:
        if not told.is_set():
            told.set()
            _log_locally(folder, "a patient's gradient failed and counts as zero")

    return tell


def respond_evaluation(
    site: SiteSettings, content: RecordDict, device: torch.device, rehearsed: Rehearsed | None = None
) -> tuple[str, Arrays, dict[str, tuple[int, ...]]]:
    """Answer an `EvaluationRequest` as far as the site's policy and the ledger of its test patients allow.

    Before the charge nothing is computed from test patients but whether their folder can be read. Where the request is
    `rehearsed`, nothing is charged, and this one release is the whole plan.

    Returns:
        The form, the sums, and the names and shapes that they may have.

    Raises:
        Refused: With the code to send instead.
    """
    # Imported here: MONAI's networks take seconds to load, and a round of training needs none of them.
    from fedcmr.client.evaluation import expected_seconds, sums
    from fedcmr.shared.tasks.ejection_fraction.network import array_shapes, from_arrays
    from fedcmr.shared.tasks.ejection_fraction.sums import SUMS

    try:
        request = EvaluationRequest.from_config(content[CONFIG])
    except (KeyError, TypeError, ValueError):
        raise Refused("bad-request") from None
    _check_agreed(site, request.sites)
    if site.policy.evaluation == "off" or site.test_path is None:
        raise Refused("no-evaluation")
    try:
        dataset = check_test_folder(site)
    except Exception as error:
        raise Refused("data-unreadable") from error
    try:
        model = decode(content[ARRAYS], array_shapes())  # a larger one, or one that holds NaN, is no such model
    except (KeyError, ValueError):
        raise Refused("bad-request") from None
    if arrays_sha256(model) != request.model_sha256:
        raise Refused("bad-request")
    shapes: dict[str, tuple[int, ...]] = {vendor: (len(SUMS),) for vendor in site.vendor_names}
    plain = site.policy.evaluation == PLAIN
    mechanism = request.mechanism
    code = (
        None
        if plain
        else refusal(
            site.policy,
            # A constant of the code bounds a patient's vector, not the server.
            replace(mechanism, max_grad_norm=site.policy.max_grad_norm),
            num_patients=site.policy.min_patients,  # noise alone is an answer: how many there are decides nothing
        )
    )
    if code is not None:
        raise Refused(code)
    network = from_arrays(model)
    seconds = expected_seconds(site, network, request.num_tta, device)
    _check_time(site, seconds)

    def table() -> Arrays:
        return sums(site, request, network, device, plain, seconds, invented=rehearsed is not None)

    def reply() -> bytes:
        arrays = table()
        pack_sums(site.name, PRIVATE, arrays, shapes)  # what may not leave is a failure of the work
        return to_bytes(arrays)

    ledger = Ledger(site.test_ledger_path, site.test_replica_path, dataset, asdict(site.policy))
    key, cap = (request.ledger_run, 1), site.policy.max_epsilon
    if rehearsed is not None:
        rehearsed.planned = [mechanism.release]
        charges = None if plain else ledger
        arrays = rehearsed.work(charges, table, delta=mechanism.target_delta, cap=cap, task=request.task, key=key)
        return site.policy.evaluation, arrays, shapes
    if plain:
        return PLAIN, table(), shapes
    answer = charged(ledger, key, mechanism, reply, cap=cap, task=request.task)
    return PRIVATE, from_bytes(answer), shapes


def _check_time(site: SiteSettings, seconds: float) -> None:
    """Refuse work that would take longer than the site allows."""
    if seconds > site.policy.max_seconds:
        raise Refused("time-above-cap") from UserError(
            f"policy.max_seconds is {site.policy.max_seconds:g}, and this request would take about {seconds:.0f} s"
        )


def _check_agreed(site: SiteSettings, sites: str) -> None:
    """Refuse code that the site has not approved, and a server that computes with other facts of the site."""
    if site.policy.allowed_code_sha256 and code_sha256() not in site.policy.allowed_code_sha256:
        raise Refused("code-not-allowed") from UserError(
            f"policy.allowed_code_sha256 of {site.folder} does not list the code that runs here, {code_sha256()}: "
            "review that version and add it, or ask for one that is listed"
        )
    if sites and facts_line(site.name, site.vendors, site.nominal_patients) not in sites.split("\n"):
        raise Refused("facts-differ") from UserError(
            f"the coordinator does not list {site.name!r} with the vendors and nominal_patients of site.yaml: correct "
            "whichever is wrong, here or there with 'fedcmr-server register' again"
        )


def site_folder(node_config: UserConfig, run_config: UserConfig) -> Path:
    """The folder with the site's `site.yaml`.

    A deployed node names it (`--node-config 'site="/data/site"'`); in Flower's own simulation a node has only its
    number, which counts the sites of the run folder in the order of their names.
    """
    if "site" in node_config:
        return Path(str(node_config["site"]))
    sites = sorted((Path(str(run_config["run-dir"])) / "sites").glob("*/site.yaml"))
    return sites[int(node_config["partition-id"])].parent


def _load_site(node_config: UserConfig, run_config: UserConfig) -> SiteSettings:
    try:
        return load_site(site_folder(node_config, run_config))
    except (UserError, KeyError, IndexError, ValueError) as error:
        raise Refused("settings-unreadable") from error


def _log_locally(folder: Path | None, code: str) -> None:
    """Tell the site's own people, in a file that stays at the site and that only they can read."""
    if folder is None:
        return
    with contextlib.suppress(Exception):  # whatever the text holds, the code must still be sent
        error_log.note(folder, code)
