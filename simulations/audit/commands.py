"""What the subcommands of `fedcmr-audit` do: collect patients, attack, print a table, return the figures."""

import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedcmr.client.policy import load_site
from fedcmr.client.training import load_patients
from fedcmr.server.experiments.models import test_provenances, test_sets
from fedcmr.server.federation.state import StudySite, initial_state, read_study
from fedcmr.server.report.audit import canary_lines, membership_lines
from fedcmr.server.run_folder import RunFolder, load_run
from fedcmr.server.settings import Config, load
from fedcmr.shared import checkpoint
from fedcmr.shared.adapters import Adapter
from fedcmr.shared.case import INDEX_NAME, Case, load_cases, read_index
from fedcmr.shared.console import plain_console
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import Prior, load_prior
from fedcmr.shared.provenance import together
from fedcmr.simulations.audit import canaries as canary_audit
from fedcmr.simulations.audit import membership as attacks
from fedcmr.simulations.audit import tables
from fedcmr.simulations.audit.copies import Nearest, audit, compare, pairs_of
from fedcmr.simulations.audit.file_names import SIMULATED_PAIRS
from fedcmr.simulations.audit.sites import BROKEN
from fedcmr.simulations.audit.study import Pool, draw_pool, middle, overfitted

OVERFIT_STEPS, OVERFIT_BATCH, OVERFIT_RATE, OVERFIT_PATIENTS, OVERFIT_SLICES = 400, 8, 5e-4, 4, 2
"""Training of the generator that must be detected; patients per hospital, and slices from the middle of each."""


def canaries(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The one-run audit of the sound build, its control and, if requested, the builds that are broken."""
    num = arguments.canaries
    num_guesses = num if arguments.guesses is None else arguments.guesses
    claim = arguments.claim
    if num < 2 or not 2 <= num_guesses <= num or arguments.repeats < 1 or (claim is not None and claim <= 0):
        raise UserError("Expected --canaries >= 2, --guesses in 2..M, --repeats >= 1 and --claim > 0.")
    config, prior, run = _study(arguments)
    if not config.privacy.enabled:
        raise UserError("privacy.enabled=false claims nothing that could be audited: switch it on")
    config = _with_adapter(config, prior, run)
    # One view: a canary's gradient is its own whatever it is averaged over, and the mechanism only sees the average.
    config = replace(config, federation=replace(config.federation, num_views=1))
    short = replace(
        config,
        privacy=replace(config.privacy, target_epsilon=claim or config.privacy.target_epsilon),
        federation=replace(config.federation, num_rounds=2, local_steps=1),  # the whole budget in one step
    )
    patients = canary_audit.make_canaries(prior, cast(Adapter, config.federation.adapter), arguments.seed)
    audit_of = functools.partial(canary_audit.audit, prior, patients, num)
    found = [audit_of(config, "sound", num_guesses), audit_of(short, "sound", num_guesses, control=True)]
    if arguments.broken:
        found += [audit_of(short, build, num_guesses, arguments.repeats) for build in ("sound", *BROKEN)]
    figures = [result.as_dict() for result in found]
    _print(tables.canaries(figures))
    for line in canary_lines(figures):
        print(line)
    return figures


def membership(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The three attacks on a run's generator, on that of a simulated study, or on one that was overfitted."""
    if arguments.patients < 2 or arguments.shadows < 0 or arguments.shadows == 1:
        raise UserError("Expected --patients >= 2 and --shadows of 0 or at least 2.")
    config, prior, run = _study(arguments)
    if run and arguments.overfitted:
        raise UserError("--overfitted makes a study of its own: leave RUN out")
    if arguments.overfitted:
        pool = draw_pool(config.hospitals.vendors, min(arguments.patients, OVERFIT_PATIENTS), prior, arguments.seed)
        pool = replace(pool, patients=[middle(patient, OVERFIT_SLICES) for patient in pool.patients])
        members = [patient for patient, member in zip(pool.patients, pool.member, strict=True) if member]
        generator = overfitted(prior, members, OVERFIT_STEPS, OVERFIT_BATCH, OVERFIT_RATE)
        found = attacks.attack_generator(prior, generator, pool)
    elif run:
        pool, arrays = _run_pool(run, prior), _published(run, prior)
        found = attacks.attack_arrays(prior, arrays, pool, _with_adapter(config, prior, run), arguments.shadows)
    else:
        pool = draw_pool(config.hospitals.vendors, arguments.patients, prior, arguments.seed)
        config = _with_adapter(config, prior, None, arguments.patients)
        found = attacks.attack_arrays(prior, attacks.federate(prior, pool, config), pool, config, arguments.shadows)
    figures = {name: result.as_dict() for name, result in found.items()}
    _print(tables.membership(figures))
    for line in membership_lines(figures):
        print(line)
    return figures


def copies(arguments: argparse.Namespace) -> dict[str, Any]:
    """Synthetic images against training and held-out patients, vendor by vendor."""
    run = load_run(arguments.run)
    if arguments.cases is not None and arguments.cases < 1:
        raise UserError(f"Expected --cases >= 1, got {arguments.cases}.")
    origins = [site.provenance for site in read_study(run).values()]
    origins += test_provenances(run, [name for name, _ in test_sets(run)]).values()
    simulated = together(origins).is_simulated
    pairs = arguments.pairs or (run.path / SIMULATED_PAIRS if simulated else None)
    groups = {
        "synthetic": load_cases(arguments.synthetic or run.path / "synthetic"),
        "training": _training_cases(run),
        "held-out": [case for _, cases in test_sets(run) for case in cases],
    }
    vendors = sorted(set.intersection(*({case.info.vendor for case in cases} for cases in groups.values())))
    if not vendors:
        raise UserError(f"{run.path} has no vendor with synthetic, training and held-out cases: finish the study first")
    parts, between = [], []
    for vendor in vendors:
        cases = {name: [case for case in group if case.info.vendor == vendor] for name, group in groups.items()}
        synthetic, training, held_out = (
            pairs_of(cases[name][: arguments.cases if name == "synthetic" else None]) for name in groups
        )
        if min(len(synthetic.images), len(training.images), len(held_out.images)) == 0:
            raise UserError(f"{run.path}: no slice of {vendor} shows a heart in one of {', '.join(groups)}")
        parts.append((synthetic, training, held_out, compare(synthetic, training), compare(synthetic, held_out)))
        between.append(compare(held_out, training))
    found = audit(_blocks([part[3] for part in parts]), _blocks([part[4] for part in parts]), _blocks(between))
    figures = {**found.as_dict(), "vendors": vendors}
    if pairs:
        tables.draw_pairs(pairs, parts)
    _print(tables.copies(figures))
    return figures


def _study(arguments: argparse.Namespace) -> tuple[Config, Prior, RunFolder | None]:
    """Settings, prior and the run folder, if there is one."""
    if arguments.run is None:
        config = load("default", arguments.settings)
        path = arguments.prior or (Path(config.prior) if config.prior else None)
        return config, load_prior(path), None
    if arguments.settings:
        raise UserError("settings are for audits without a run folder: RUN has settings of its own")
    run = load_run(arguments.run)
    return run.config, load_prior(run.prior_path()), run


def _with_adapter(config: Config, prior: Prior, run: RunFolder | None, num_patients: int | None = None) -> Config:
    """The settings with the adapter that the study takes, not the one that the size of an audit would choose."""
    if run:
        sites = read_study(run)
    else:
        size = config.hospitals.num_train if num_patients is None else num_patients
        sites = {f"{i}": StudySite({vendor: size}, size) for i, vendor in enumerate(config.hospitals.vendors)}
    adapter = initial_state(config, prior, sites).adapter
    return replace(config, federation=replace(config.federation, adapter=adapter))


def _training_cases(run: RunFolder) -> list[Case]:
    return [case for name in run.site_names() for case in load_cases(load_site(run.path / "sites" / name).data_path)]


def _run_pool(run: RunFolder, prior: Prior) -> Pool:
    """The run's training patients by site, and its test patients as if they had come to the site of their vendor."""
    patients, member, site, vendors = [], [], [], []
    known: list[tuple[str, ...]] = []
    for number, name in enumerate(run.site_names()):
        settings = load_site(run.path / "sites" / name)
        found = load_patients(settings.data_path, prior, settings.vendor_names, settings.policy.contours)
        patients += found
        member += [True] * len(found)
        site += [number] * len(found)
        vendors.append(" and ".join(settings.vendor_names))
        known.append(settings.vendor_names)
    for index in sorted((run.path / "test").rglob(INDEX_NAME)):
        vendor = read_index(index.parent)[0].vendor
        like = next((number for number, names in enumerate(known) if vendor in names), None)
        if like is not None:
            found = load_patients(index.parent, prior, known[like])
            patients += found
            member += [False] * len(found)
            site += [like] * len(found)
    pool = Pool(patients, np.array(member, bool), np.array(site, np.int64), vendors)
    if min(pool.member.sum(), (~pool.member).sum()) < 2:
        raise UserError(f"{run.path} has fewer than two training or test patients of its vendors: prepare it first")
    return pool


def _published(run: RunFolder, prior: Prior) -> checkpoint.Arrays:
    """The trainable part in `generator.safetensors`."""
    path = run.path / "generator.safetensors"
    arrays, metadata = checkpoint.load(path)
    if metadata["prior_sha256"] != prior.sha256:
        raise UserError(f"{path} belongs to another prior than the run's settings name: run the study again")
    return {name.removeprefix("trainable/"): a for name, a in arrays.items() if name.startswith("trainable/")}


def _blocks(parts: list[Nearest]) -> NDArray[np.float64]:
    """Distances of several vendors as one matrix; patients of other vendors are infinitely far."""
    distances = [part.distance for part in parts]
    whole = np.full(np.sum([part.shape for part in distances], axis=0), np.inf)
    row = column = 0
    for part in distances:
        whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return whole


def _print(table: Any) -> None:
    plain_console(width=None if sys.stdout.isatty() else 140).print(table)
