"""Baselines that only a simulation can have, because they look at what no server may see: the sites' own cases.

Each is evaluated on the main model's test patients: pooled real scans without privacy, the federation without privacy
or at another epsilon, every site alone, and the federation without one of its sites. What they spend or disclose is no
part of the study's epsilon: they are for this machine's eyes.
"""

import os
from copy import deepcopy
from dataclasses import replace
from functools import partial

from fedcmr.client.policy import load_site, write_site
from fedcmr.server.experiments.cross_vendor import train_cross_vendor
from fedcmr.server.experiments.models import predictions_folder, train_models
from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.federation.state import read_study, write_study
from fedcmr.server.run_folder import RunFolder, open_run
from fedcmr.server.settings import Config, PrivacyConfig
from fedcmr.server.tasks.registry import tasks_of
from fedcmr.shared.case import Case, load_cases
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.privacy import largest_delta
from fedcmr.simulations.grid import make_grid, run_server_app


def run_baselines(run: RunFolder) -> None:
    """Train the baselines that the settings ask for; each is a stage of its own.

    Raises:
        UserError: A site is to be left out of a study that has no other.
    """
    config = run.config
    studies = nested_studies(config, run.site_names())
    if "pooled_real" in config.evaluation.baselines:
        train_models(run, "pooled_real", partial(_real_cases, run), real=True)
    if "real" in config.evaluation.cross_vendor:
        train_cross_vendor(run, "real", _real_cases(run))
    for model, (sites, privacy) in studies.items():
        with run.stage(model) as to_do:
            if to_do:
                _nested_study(run, model, sites, privacy)


def _real_cases(run: RunFolder) -> list[Case]:
    """All sites' training cases."""
    folders = [load_site(run.path / "sites" / name).data_path for name in run.site_names()]
    return [case for folder in folders for case in load_cases(folder)]


def nested_studies(config: Config, sites: list[str]) -> dict[str, tuple[list[str], PrivacyConfig]]:
    """The baselines that are studies of their own: {model: (its sites, its privacy)}.

    Args:
        config: The main study's.
        sites: The main study's.

    Raises:
        UserError: A site is to be left out of a study that has no other.
    """
    wanted, privacy = config.evaluation.baselines, config.privacy
    studies = {}
    if "federated_without_privacy" in wanted:
        studies["federated_without_privacy"] = (sites, replace(privacy, enabled=False))
    for value in config.evaluation.epsilons:
        studies[f"epsilon_{value:g}"] = (sites, replace(privacy, enabled=True, target_epsilon=value))
    if "local_only" in wanted:
        studies |= {f"local_only_{name}": ([name], privacy) for name in sites}
    if "leave_one_site_out" in wanted:
        if len(sites) < 2:
            raise UserError(f"evaluation.baselines: leave_one_site_out needs two sites, got {len(sites)}: leave it out")
        studies |= {f"without_{name}": ([other for other in sites if other != name], privacy) for name in sites}
    return studies


def link_sites(run: RunFolder, other: RunFolder, sites: list[str], privacy: PrivacyConfig) -> None:
    """Give another run some of a run's sites, and its test patients, without a copy of any case.

    Each site gets a ledger of its own and a policy that fits `privacy`, as the simulated hospitals themselves do.
    """
    for name in sites:
        site = load_site(run.path / "sites" / name)
        folder = other.path.resolve() / "sites" / name
        policy = replace(
            site.policy,
            max_epsilon=privacy.target_epsilon,
            max_delta=min(privacy.target_delta, largest_delta(site.nominal_patients)),
            min_sample_rate=privacy.sample_rate,
            allow_without_privacy=not privacy.enabled,
        )
        data = os.path.relpath(site.data_path, folder)
        write_site(folder, replace(site, data=data, test=None, ledger="ledger", ledger_replica=None, policy=policy))
    facts = read_study(run)
    write_study(other, {name: facts[name] for name in sites})
    test = other.path / "test"
    if not test.exists():
        patients = (run.path / "test").resolve()
        test.symlink_to(os.path.relpath(patients, other.path.resolve()), target_is_directory=True)


def _nested_study(run: RunFolder, model: str, sites: list[str], privacy: PrivacyConfig) -> None:
    """A study of its own in `baselines/<model>/`, on the same prepared cases, whose predictions become a baseline."""
    settings = deepcopy(run.config)
    settings.privacy = privacy
    settings.evaluation.baselines, settings.evaluation.epsilons, settings.evaluation.cross_vendor = [], [], []
    settings.evaluation.federated = settings.evaluation.fidelity = False
    federation = settings.federation  # with fewer sites it requests no more of them than there are
    federation.min_sites = federation.min_sites and min(federation.min_sites, len(sites))
    federation.trim = min(federation.trim, (len(sites) - 1) // 2)
    vendors = {vendor for name in sites for vendor in load_site(run.path / "sites" / name).vendors}
    shares = settings.synthesis.vendor_shares.items()  # of the vendors that this study learns; none left: equal shares
    settings.synthesis.vendor_shares = {name: share for name, share in shares if name in vendors and share > 0}
    nested = open_run(run.path / "baselines" / model, settings)
    link_sites(run, nested, sites, privacy)
    with make_grid(nested) as grid:
        run_server_app(grid, {"run-dir": str(nested.path.resolve())})
    for task_name in tasks_of(settings):
        answers = predictions_folder(run, task_name) / f"{model}.json"
        private_folder(answers.parent)
        write_atomically(answers, (predictions_folder(nested, task_name) / f"{MAIN_MODEL}.json").read_bytes())
