"""Rehearsal of a study: the whole path with every registered site, without a patient and without a charge.

Each site gets the request of each kind of round. It decides as it would in the study, works on invented patients, and
replies with a code, a time and zeros (`fedcmr.client.rehearsal`). The coordinator rehearses its own part on a few
synthetic patients of the public prior. Where the sites shall evaluate the model, that one is sent to them
(`fedcmr.server.rehearsal.evaluation`). What the study would charge follows from public numbers.
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from fedcmr.server.experiments.models import test_sets
from fedcmr.server.federation.expectation import expected
from fedcmr.server.federation.round import requested_shapes
from fedcmr.server.federation.senders import read_nodes
from fedcmr.server.federation.state import FederationState, StudySite, initial_state, make_request, quorum, read_study
from fedcmr.server.federation.strategy import Grid, SitesByFlower
from fedcmr.server.generation.synthesis import synthesize
from fedcmr.server.rehearsal import evaluation as rehearsal_evaluation
from fedcmr.server.rehearsal.evaluation import rehearse_evaluation
from fedcmr.server.rehearsal.outcomes import NO_ANSWER, outcomes
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import Config
from fedcmr.server.tasks.ejection_fraction.calibration import train_calibrated
from fedcmr.shared.case import Case
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.console import plain_console
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import Release
from fedcmr.shared.records import OK, Request
from fedcmr.shared.tasks.ejection_fraction.inference import predict
from fedcmr.shared.tasks.ejection_fraction.network import Regressor, to_arrays

FILE_NAME = "rehearsal.json"
WIDE = 140
"""Columns of the printed table where the output is not a terminal."""
DATA_CODES = ("data-unreadable", "too-few-patients")
TRAINING_STEPS = 3
SPARE_BYTES = 200 << 20
"""Disk space needed besides the synthetic cases: checkpoints, models and the report."""


def rehearse(grid: Grid, run: RunFolder, prior: Prior) -> dict[str, Any]:
    """Rehearse the study of a run folder and write `rehearsal.json` there.

    Returns:
        `sites` ({name: codes and seconds by kind of round, epsilon}), `unnamed` (codes without a site), `connected`
        nodes, `quorum`, `rounds` and `round_s` by kind, `coordinator` (test sets, seconds and bytes by stage),
        `evaluation` (of `rehearse_evaluation`; None where the sites evaluate nothing), and `reasons` why the study
        cannot start, empty where it can.
    """
    config, sites = run.config, read_study(run)
    state = initial_state(config, prior, sites)
    tasks = [state.task_of(number, config) for number in range(1, state.num_rounds(config) + 1)]
    counts = Counter(tasks)
    requests = {task: make_request(config, state, tasks.index(task) + counts[task], sites) for task in counts}
    planned = plan(requests, counts) if state.plan else []
    facts: dict[str, Any] = {
        "sites": {name: {"codes": {}, "seconds": {}, "epsilon": None} for name in sites},
        "unnamed": [],
        "connected": 0,
        "quorum": {task: quorum(config.federation, len(sites), task) for task in requests},
        "rounds": dict(counts),
        "round_s": {},
        "delta": config.privacy.target_delta if state.plan else None,
        "adapter": state.described(config),
        "expected": expected(state, config, sites),
    }
    connected = SitesByFlower(grid, config.federation, len(sites), read_nodes(run))
    node_ids = connected.wait(len(sites), 0)
    facts["connected"] = len(node_ids)
    for task, request in requests.items():
        started = time.monotonic()
        replies = connected.rehearse(request, state.arrays_of(task), planned, node_ids)
        facts["round_s"][task] = round(time.monotonic() - started, 1)
        found, unnamed = outcomes(replies, requested_shapes(request, state, sites))
        facts["unnamed"] += unnamed
        for name, outcome in found.items():
            facts["sites"][name]["codes"][task] = outcome.code
            if outcome.seconds is not None:
                facts["sites"][name]["seconds"][task] = outcome.seconds
    for name, (epsilon, _) in _epsilons(state, sites, planned, config).items():
        facts["sites"][name]["epsilon"] = epsilon
    facts["coordinator"], model = _rehearse_coordinator(run, prior, sites)
    facts["evaluation"] = None
    if config.evaluation.federated:
        evaluation = rehearse_evaluation(connected, node_ids, state.run_id, config, sites, to_arrays(model))
        facts["unnamed"] += evaluation.pop("unnamed")
        facts["evaluation"] = evaluation
    facts["reasons"] = reasons(facts)
    write_atomically(run.path / FILE_NAME, (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    return facts


def plan(requests: Mapping[str, Request], counts: Mapping[str, int]) -> list[Release]:
    """All releases of the study: the rounds of one kind are one release of all their steps."""
    releases = {task: request.mechanism.release for task, request in requests.items()}
    return [replace(release, num_steps=release.num_steps * counts[task]) for task, release in releases.items()]


def reasons(facts: Mapping[str, Any]) -> list[str]:
    """Why the study cannot start; empty where it can."""
    found = list(facts["coordinator"]["reasons"])
    for task, needed in facts["quorum"].items():
        ready = sum(site["codes"].get(task) == OK for site in facts["sites"].values())
        if ready < needed:
            codes = {name: site["codes"].get(task, NO_ANSWER) for name, site in facts["sites"].items()}
            refusals = ", ".join(f"{name}: {code}" for name, code in codes.items() if code != OK)
            found.append(f"{ready} of the {needed} sites that a round of {task} needs would answer ({refusals})")
    evaluation = facts["evaluation"] and rehearsal_evaluation.reason(facts["evaluation"])
    return [*found, evaluation] if evaluation else found


def table(facts: Mapping[str, Any]) -> Table:
    """A table of the sites."""
    shown = Table("site", "connected", "code", "data", "policy and budget", "time per round", "would charge")
    for name, site in facts["sites"].items():
        codes = set(site["codes"].values())
        bad = sorted(codes - {OK})
        heard = bool(codes - {NO_ANSWER})
        data = [code for code in bad if code in DATA_CODES]
        other = [code for code in bad if code not in (*DATA_CODES, "code-not-allowed", NO_ANSWER)]
        unknown = "not known" if not heard or "code-not-allowed" in codes else "allowed"
        times = ", ".join(f"{task} {seconds:g} s" for task, seconds in site["seconds"].items())
        epsilon = "nothing: no privacy" if facts["delta"] is None else f"{site['epsilon']:.2f} at {facts['delta']:g}"
        shown.add_row(
            name,
            "yes" if heard else "no",
            "not allowed" if "code-not-allowed" in codes else "allowed" if heard else "not known",
            ", ".join(data) or ("readable" if OK in codes else "not known"),
            ", ".join(other) or (unknown if not data else "not known"),
            times or "not known",
            epsilon,
        )
    return shown


def show(facts: Mapping[str, Any]) -> None:
    """Print the result.

    Raises:
        UserError: The study cannot start; the message gives the reasons.
    """
    console = plain_console(width=None if sys.stdout.isatty() else WIDE)
    console.print(table(facts))
    if facts["evaluation"]:
        console.print(rehearsal_evaluation.table(facts["evaluation"]))
    for sentence in sentences(facts):
        console.print(sentence, markup=False)
    if facts["reasons"]:
        raise UserError(f"the study cannot start: {'; '.join(facts['reasons'])}")
    console.print("the study can start")


def sentences(facts: Mapping[str, Any]) -> list[str]:
    """The results that the table does not hold, as sentences."""
    rounds_s = sum(facts["rounds"][task] * seconds for task, seconds in facts["round_s"].items())
    coordinator = facts["coordinator"]
    lines = [f"a site refused without its name: {code}; see errors.log at each site" for code in facts["unnamed"]]
    lines += [facts["adapter"], *facts["expected"]]
    lines.append(f"{sum(facts['rounds'].values())} rounds would take about {_time(rounds_s)}, as the slowest site")
    if "synthesis_s" in coordinator:
        lines.append(
            f"then synthesis about {_time(coordinator['synthesis_s'])}, training of the main model about "
            f"{_time(coordinator['training_s'])}, {coordinator['needed_bytes'] / 1e6:.0f} MB of disk"
        )
    tests = ", ".join(f"{name} ({num} patients)" for name, num in coordinator["test_sets"].items())
    lines.append(f"test sets: {tests}" if tests else "test sets: none")
    if facts["evaluation"]:
        answers = [site["code"] == OK for site in facts["evaluation"]["sites"].values()]
        lines.append(
            f"{sum(answers)} of {len(answers)} sites would evaluate the model on their own test patients, in "
            f"about {_time(facts['evaluation']['elapsed_s'])}; the others stop no study"
        )
    lines.append("nothing was charged and nothing that depends on a patient left a site")
    return lines


def _epsilons(
    state: FederationState, sites: Mapping[str, StudySite], planned: list[Release], config: Config
) -> dict[str, tuple[float, str]]:
    """Epsilon of the whole study for each site, accounted as in a run."""
    if not planned:
        return {}
    entries = [{"charged": True, "release": asdict(release)} for release in planned]
    return replace(state, releases=dict.fromkeys(sites, entries)).epsilons(config.privacy.target_delta)


def _rehearse_coordinator(
    run: RunFolder, prior: Prior, sites: Mapping[str, StudySite]
) -> tuple[dict[str, Any], Regressor]:
    """Check test sets and disk, and try synthesis, training and prediction on a few patients of the public prior."""
    config = run.config
    facts: dict[str, Any] = {"test_sets": {}, "reasons": []}
    held_out: list[tuple[str, list[Case]]] = []
    try:
        held_out = test_sets(run)
    except UserError as error:
        facts["reasons"].append(str(error))
    facts["test_sets"] = {name: len(cases) for name, cases in held_out}
    vendors = sorted({vendor for site in sites.values() for vendor in site.vendors})
    started = time.monotonic()
    few = replace(config.synthesis, num_cases=max(2, len(vendors)))
    cases = synthesize(prior, None, few, vendors, config.seed, config.device, "rehearsing synthesis").cases
    facts["synthesis_s"] = round((time.monotonic() - started) / len(cases) * config.synthesis.num_cases, 1)
    started = time.monotonic()
    device = pick_device(config.device)
    steps = min(TRAINING_STEPS, config.regression.num_steps)
    model = train_calibrated(cases, replace(config.regression, num_steps=steps), config.seed, device)
    facts["training_s"] = round((time.monotonic() - started) / steps * config.regression.num_steps, 1)
    for _, patients in held_out:
        predict(model, patients[:1], config.regression.num_tta, device)
    num_copies = 1 + config.synthesis.dicom + config.synthesis.nifti
    num_bytes = sum(case.frames.nbytes + case.masks.nbytes for case in cases) / len(cases)
    facts["needed_bytes"] = round(num_bytes * config.synthesis.num_cases * num_copies + SPARE_BYTES)
    free = shutil.disk_usage(run.path).free
    if free < facts["needed_bytes"]:
        facts["reasons"].append(
            f"{run.path.parent} has {free / 1e6:.0f} MB free and the study needs about "
            f"{facts['needed_bytes'] / 1e6:.0f} MB"
        )
    return facts, model


def _time(seconds: float) -> str:
    """A duration in seconds, minutes or hours, whichever is short."""
    for unit, length, limit in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
