"""Studies for the audit: the project's own, and builds that are broken on purpose so that the audit can fail.

What is broken is what goes into the client's code or how often it is run; the code itself is the client's. A broken
build exists here and nowhere else.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from fedcmr.client.training import Patient
from fedcmr.server.federation.round import run_round
from fedcmr.server.federation.state import FederationState, StudySite, initial_state
from fedcmr.server.settings import Config
from fedcmr.shared.checkpoint import Arrays
from fedcmr.shared.models.prior import Prior
from fedcmr.shared.privacy import Mechanism, epsilon
from fedcmr.shared.progress import track
from fedcmr.shared.records import Request
from fedcmr.simulations.in_process import SitesInProcess

Build = Literal["sound", "noise_off", "clip_off", "slices_as_unit", "ledger_reset"]
BUILDS: tuple[Build, ...] = get_args(Build)
BROKEN = BUILDS[1:]
UNCLIPPED = 1e6
"""By how much the clip is widened where it is off; the noise stays what the plan says."""
VENDOR = "Siemens"
"""Vendor of all audited sites; no figure of an audit depends on it."""


@dataclass(frozen=True)
class Round:
    """What the server sees of a round.

    Attributes:
        request: What it requested.
        start: The trainable part that it sent.
        replies: Site -> what it sent back.
    """

    request: Request
    start: Arrays
    replies: Mapping[str, Arrays]


@dataclass(frozen=True)
class Run:
    """All rounds of a study, and the epsilon that it claims at the settings' delta, at each site."""

    rounds: list[Round]
    claimed_epsilon: float


def run_study(
    prior: Prior,
    sites: Mapping[str, Sequence[Patient]],
    nominal_patients: int,
    config: Config,
    build: Build,
    num_repeats: int,
) -> list[Run]:
    """A study of these sites, with the real plan, requests and client code.

    Args:
        prior: The public prior.
        sites: Site -> its patients; not read by whoever plans.
        nominal_patients: Every site's public number.
        config: Settings of the study; privacy is on.
        build: What to break.
        num_repeats: Repeats of the whole study where the ledger forgets; the claim then counts one of them. Otherwise
            unused.

    Returns:
        One run, or `num_repeats` of them for `ledger_reset`.
    """
    config = replace(config, federation=replace(config.federation, segmenter_rounds=0))  # the generator is audited
    patients = {name: list(there) for name, there in sites.items()}
    if build == "slices_as_unit":
        patients = {name: [p for patient in there for p in slices_of(patient)] for name, there in patients.items()}
    facts = {name: StudySite({VENDOR: nominal_patients}, nominal_patients) for name in patients}
    first = initial_state(config, prior, facts)
    assert first.plan is not None, "an audit needs a claim"
    claim = epsilon(list(first.plan.values()), config.privacy.target_delta)[0]
    times = num_repeats if build == "ledger_reset" else 1
    return [
        Run(_rounds(prior, patients, facts, config, build, first), claim)
        for _ in track(range(times), f"running the sites ({build.replace('_', ' ')})")
    ]


def slices_of(patient: Patient) -> list[Patient]:
    """Every slice as if it were a patient of its own, with the patient's name: what "one item is one image" does."""
    return [
        replace(
            patient,
            images=patient.images[n : n + 1],
            masks=patient.masks[n : n + 1],
            vendors=patient.vendors[n : n + 1],
        )
        for n in range(len(patient.images))
    ]


def mechanism(request: Request, nominal_patients: int, build: Build = "sound") -> Mechanism:
    """The site's mechanism for a request, or a broken one."""
    sound = request.mechanism.at(nominal_patients)
    if build == "noise_off":
        return replace(sound, noise_multiplier=0.0)
    if build == "clip_off":
        return replace(
            sound,
            max_grad_norm=sound.max_grad_norm * UNCLIPPED,
            noise_multiplier=sound.noise_multiplier / UNCLIPPED,
        )
    return sound


def _rounds(
    prior: Prior,
    patients: Mapping[str, list[Patient]],
    facts: Mapping[str, StudySite],
    config: Config,
    build: Build,
    state: FederationState,
) -> list[Round]:
    broken = functools.partial(mechanism, build=build)
    there = SitesInProcess(prior, patients, facts, torch.device("cpu"), broken)
    rounds = []
    while state.server_round < state.num_rounds(config):
        start = state.arrays
        state, happened = run_round(state, facts, config, there.train)
        rounds.append(Round(happened.request, start, there.updates))
    return rounds
