"""Baselines that only a simulation can have, because they look at what no server may see: the sites' own cases.

Each is judged on the main model's test patients: pooled real scans without privacy, the federation without privacy,
and every site alone. What they spend or disclose is no part of the study's epsilon: they are for this machine's eyes.
"""

import json
import os
import shutil
from copy import deepcopy
from dataclasses import replace

from client.policy import load_site, write_site
from server.report.build import MAIN_MODEL
from server.study import train_and_predict
from shared.case import load_cases
from shared.config import Config
from shared.run_folder import RunFolder, open_run
from simulations.grid import make_grid, run_server_app


def run_baselines(run: RunFolder, config: Config) -> None:
    """Train the baselines that the settings ask for; each is a stage of its own."""
    wanted = config.evaluation.baselines
    if "pooled_real" in wanted:
        with run.stage("pooled_real") as to_do:
            if to_do:
                folders = [load_site(run.path / "sites" / name).data_path for name in run.site_names()]
                train_and_predict(run, config, "pooled_real", [case for f in folders for case in load_cases(f)])
    if "federated_without_privacy" in wanted:
        _nested_study(run, config, "federated_without_privacy", run.site_names(), private=False)
    if "local_only" in wanted:
        for name in run.site_names():
            _nested_study(run, config, f"local_only_{name}", [name], private=config.privacy.enabled)


def _nested_study(run: RunFolder, config: Config, model: str, sites: list[str], private: bool) -> None:
    """A study of its own in `baselines/<model>/`, on the same prepared cases, whose answers become a baseline."""
    with run.stage(model) as to_do:
        if not to_do:
            return
        settings = deepcopy(config)
        settings.privacy.enabled = private
        settings.evaluation.baselines = []
        nested = open_run(run.path / "baselines" / model, settings)
        _link_sites(run, nested, sites, private)
        with make_grid(nested, settings) as grid:
            run_server_app(grid, {"run-dir": str(nested.path.resolve())})
        answers = run.path / "predictions" / f"{model}.json"
        answers.parent.mkdir(exist_ok=True)
        shutil.copyfile(nested.path / "predictions" / f"{MAIN_MODEL}.json", answers)


def _link_sites(run: RunFolder, nested: RunFolder, sites: list[str], private: bool) -> None:
    """Give the nested study the run's sites, each with a ledger of its own, and its test patients."""
    for name in sites:
        site = load_site(run.path / "sites" / name)
        policy = replace(site.policy, allow_without_privacy=not private)
        folder = nested.path / "sites" / name
        write_site(folder, replace(site, data=os.path.relpath(site.data_path, folder), policy=policy))
    study = json.loads((run.path / "study.json").read_text(encoding="utf-8"))
    facts = {name: study["sites"][name] for name in sites}
    (nested.path / "study.json").write_text(json.dumps({"sites": facts}, indent=2) + "\n", encoding="utf-8")
    test = nested.path / "test"
    if not test.exists():
        test.symlink_to(os.path.relpath(run.path / "test", nested.path), target_is_directory=True)
