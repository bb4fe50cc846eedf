"""One study under several seeds on the same patients, each seed a run folder of its own.

The first seed's hospitals are written and prepared; the others use its cases in place, with sites, policies and ledgers
of their own. So the seeds differ in the privacy noise, the synthetic hearts and the ResNet50's start and batches, and
never in the patients. Every part resumes where it was interrupted.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from fedcmr.server.experiments.names import MAIN_MODEL
from fedcmr.server.run_folder import CONFIG_NAME, RunFolder, load_run, open_run
from fedcmr.server.settings import BASELINES, Config, EvaluationConfig, dump
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import console
from fedcmr.simulations.baselines import link_sites, nested_studies

SINGLE_MODELS = ("predict_the_mean", "prior_only", "pooled_real")
"""Baselines that are one model each and no study of their own."""
EPSILON_ROW = "epsilon_"
EPSILONS = (1.0, 3.0)
MAIN_STAGES = ("federation", "synthesis", "regressor")
POLL_S = 0.5


def default_rows(config: Config) -> list[str]:
    """Every row that is no repetition of another one in a study of this many sites."""
    hospitals = config.hospitals
    num_sites = {
        "phantom": len(hospitals.vendors),
        "acdc": len(hospitals.acdc_train_folds),
        "prepared": len(list(Path(config.data_root or "").glob("*/train/cases.csv"))),
    }[hospitals.source]
    rows = list(BASELINES)
    if num_sites < 2:
        rows.remove("local_only")
    if num_sites < 3:  # of two sites, the study without the one is the other alone
        rows.remove("leave_one_site_out")
    if not config.privacy.enabled:
        rows.remove("federated_without_privacy")
    same = config.privacy.target_epsilon if config.privacy.enabled else None
    return rows + [f"{EPSILON_ROW}{value:g}" for value in EPSILONS if value != same]


def with_rows(evaluation: EvaluationConfig, rows: Sequence[str]) -> EvaluationConfig:
    """The settings that ask for these rows and no others.

    Raises:
        UserError: There is no such row.
    """
    epsilons = []
    for row in rows:
        if row not in BASELINES:
            try:
                epsilons.append(float(row.removeprefix(EPSILON_ROW) if row.startswith(EPSILON_ROW) else ""))
            except ValueError:
                raise UserError(f"--rows: expected {', '.join(BASELINES)} or epsilon_VALUE, got {row!r}") from None
    return replace(evaluation, baselines=[row for row in rows if row in BASELINES], epsilons=epsilons)


def prepare_seeds(config: Config, folder: Path, name: str, num_seeds: int) -> list[Path]:
    """Make or open the run folders `folder/<name>-seed<k>`, with prepared cases, for `num_seeds` seeds in a row.

    Args:
        config: Settings of all studies; its seed is the first one.
        folder: Receives the run folders.
        name: How their names begin.
        num_seeds: At least 1.

    Raises:
        UserError: A folder belongs to settings that differ in more than their rows, or preparing failed.
    """
    paths = []
    for seed in range(config.seed, config.seed + num_seeds):
        paths.append(folder / f"{name}-seed{seed}")
        _open_with_rows(paths[-1], replace(config, seed=seed))
    if not load_run(paths[0]).is_done("prepare"):
        _simulate(paths[:1], 1, "--until", "prepare")
    for path in paths[1:]:
        _use_cases_of(load_run(paths[0]), load_run(path))
    return paths


def run_seeds(paths: Sequence[Path], models: Sequence[str], num_jobs: int) -> None:
    """Run `fedcmr-simulate` in every folder in which a model is missing, `num_jobs` at a time.

    Each process gets its share of the cores as torch threads, unless OMP_NUM_THREADS says otherwise. One job shows its
    own progress; of several, each writes to `<folder>.log`.

    Raises:
        UserError: One of them failed. The others are stopped; the same command resumes all.
    """
    _simulate([path for path in paths if not _is_finished(load_run(path), models)], num_jobs)


def models_of(config: Config, sites: list[str]) -> list[str]:
    """Every model that a study with these settings trains, the main one first."""
    single = [model for model in SINGLE_MODELS if model in config.evaluation.baselines]
    return [MAIN_MODEL, *single, *nested_studies(config, sites)]


def model_seconds(run: RunFolder, model: str) -> float:
    """What a model took from the prepared cases to its predictions."""
    seconds = run.stage_seconds()
    return sum(seconds.get(stage, 0.0) for stage in (MAIN_STAGES if model == MAIN_MODEL else (model,)))


def _open_with_rows(path: Path, config: Config) -> None:
    """Make the folder, or ask an earlier one for these rows; in all but the rows the settings must agree."""
    as_before = deepcopy(config)
    if (path / CONFIG_NAME).is_file():
        earlier = load_run(path).config.evaluation
        as_before.evaluation.baselines, as_before.evaluation.epsilons = earlier.baselines, earlier.epsilons
    open_run(path, as_before)  # nobody keeps the run, so that its lock is free again
    write_atomically(path / CONFIG_NAME, dump(config).encode())


def _use_cases_of(first: RunFolder, run: RunFolder) -> None:
    """Take over the first seed's sites and test patients in place of making new ones."""
    run.lock()
    for stage in ("hospitals", "prepare"):
        if first.is_done(stage) and not run.is_done(stage):
            if stage == "prepare":
                link_sites(first, run, first.site_names(), run.config.privacy)
            run.mark_done(stage, 0.0)


def _is_finished(run: RunFolder, models: Sequence[str]) -> bool:
    """Whether the models and the report are there."""
    return run.is_done("report") and all(run.is_done(model) for model in models if model != MAIN_MODEL)


def _simulate(paths: Sequence[Path], num_jobs: int, *options: str) -> None:
    """Run `fedcmr-simulate` on each folder with its own settings, `num_jobs` at a time, and pass an interruption on."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_jobs)), **os.environ}
    waiting = deque(paths)
    running: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                path = waiting.popleft()
                command = [
                    sys.executable,
                    "-m",
                    "fedcmr.simulations.cli",
                    "--config",
                    path / CONFIG_NAME,
                    "--out",
                    path,
                ]
                with _log(path).open("ab") if num_jobs > 1 else contextlib.nullcontext() as errors:
                    # A session of its own: Ctrl-C on the terminal reaches it once, from here.
                    running[path] = subprocess.Popen(
                        [*map(str, command), *options],
                        env=environment,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                        start_new_session=True,
                    )
                console.print(f"{path}: started", highlight=False, soft_wrap=True)
            time.sleep(POLL_S)
            for path in [path for path, process in running.items() if process.poll() is not None]:
                code = running.pop(path).returncode
                if code != 0:
                    place = f"at the end of {_log(path)}" if num_jobs > 1 else "above"
                    raise UserError(f"{path}: fedcmr-simulate ended with exit code {code}, see its message {place}")
                console.print(f"{path}: finished", highlight=False, soft_wrap=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()


def _log(path: Path) -> Path:
    """Where one of several jobs writes its messages: next to its folder."""
    return path.with_name(f"{path.name}.log")
