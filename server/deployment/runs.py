"""A study run between institutions: its folder on the coordinator's machine, `flwr run`, and its status.

The ServerApp resumes from the newest checkpoint of its run folder, and a site sends the same bytes again for a round
that it has replied to. So a run that died, with the SuperLink or alone, is resumed by running it again.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcmr.server.deployment.coordinator import Coordinator
from fedcmr.server.deployment.services import (
    BIN,
    CONNECTION,
    EXECUTOR,
    SUPERLINK,
    environment,
    flwr,
    healthy,
    node_ids,
    running_pid,
    serverapp_runs,
)
from fedcmr.server.experiments.preconditions import check_can_run, check_patients_unseen
from fedcmr.server.federation.participation import participation
from fedcmr.server.federation.senders import write_nodes
from fedcmr.server.federation.state import check_delta, quorum, read_study, write_study
from fedcmr.server.run_folder import RunFolder, copy_cases, load_run, open_run
from fedcmr.server.settings import load, with_absolute_paths
from fedcmr.shared.case import read_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder

ROOT = Path(__file__).resolve().parents[2]
LAST_ROUNDS = 3


def make_run(coordinator: Coordinator, out: Path, config: str, overrides: Sequence[str], tests: Sequence[Path]) -> None:
    """Make a run folder for the registered sites, with the coordinator's own test patients where it has some.

    Args:
        coordinator: The study's coordinator.
        out: The new run folder.
        config: Name or path of the settings.
        overrides: key=value.
        tests: Folders of prepared cases; copied, each as a test set of its name. Empty where only the sites evaluate.

    Raises:
        UserError: No site is registered, the study's delta is too large for one, a test folder holds no case, two have
            the same name, or the services do not run.
    """
    sites = coordinator.sites()
    if not sites:
        raise UserError(f"no site is registered in {coordinator.folder}: 'fedcmr-server register' does it")
    if len({path.resolve().name for path in tests}) < len(tests):
        raise UserError("--test names two folders of one name: expected names that tell the test sets apart")
    for path in tests:
        if not read_index(path):
            raise UserError(f"--test {path} holds no case: prepare one with 'fedcmr-client prepare'")
    settings = with_absolute_paths(load(config, overrides))
    check_can_run(settings)
    check_patients_unseen(settings, tests)
    if not tests and not settings.evaluation.federated:
        raise UserError(
            "a new run needs --test: folders of prepared cases that the trained model is evaluated on; or, where the "
            "sites shall evaluate it on theirs, evaluation.federated=true"
        )
    check_delta(settings.privacy, {name: site.nominal_patients for name, site in sites.items()})
    require_services(coordinator)
    run = open_run(out, settings)
    try:
        for path in tests:
            copy_cases(path, private_folder(run.path / "test") / path.resolve().name)
        write_study(run, sites)
    except BaseException:  # also an interruption: a run without its test patients could not be resumed
        shutil.rmtree(out)
        raise


def require_services(coordinator: Coordinator) -> None:
    """Refuse to continue without running services.

    Raises:
        UserError: They do not run.
    """
    if not healthy(coordinator) or running_pid(coordinator, EXECUTOR) is None:
        raise UserError(f"the services do not run: 'fedcmr-server start {coordinator.folder}' starts them")


def run_study(coordinator: Coordinator, out: Path) -> None:
    """Run or resume the study in a run folder up to its report; its log is shown as it comes.

    Raises:
        UserError: The services do not run, the study ended before its report, or Flower has another run that is not
            finished.
    """
    require_services(coordinator)
    run = load_run(out)
    _flower_run(coordinator, run)
    if not run.is_done("report"):
        raise UserError(
            f"the study has not come to its report: {run.path / 'log.txt'} and {coordinator.folder / 'logs'} say why; "
            "the same command resumes where it stopped"
        )


def rehearse_study(
    coordinator: Coordinator, config: str, overrides: Sequence[str], tests: Sequence[Path]
) -> dict[str, Any]:
    """Rehearse a study with the registered sites in a run folder of its own, of which only `rehearsal.json` is kept.

    Args:
        coordinator: The study's coordinator.
        config: Name or path of the settings, as in `make_run`.
        overrides: key=value.
        tests: Folders of prepared cases.

    Returns:
        What `fedcmr.server.rehearsal.rehearsal.rehearse` returned.

    Raises:
        UserError: As for `make_run`, or the rehearsal did not finish.
    """
    from fedcmr.server.rehearsal.rehearsal import FILE_NAME  # takes seconds, which `status` need not wait for

    out = coordinator.folder / "rehearsal"
    shutil.rmtree(out, ignore_errors=True)
    try:
        make_run(coordinator, out, config, overrides, tests)
        _flower_run(coordinator, load_run(out), "rehearsal=true")
        try:
            found = (out / FILE_NAME).read_bytes()
        except FileNotFoundError:
            raise UserError(f"the rehearsal came to no end: {coordinator.folder / 'logs'} says why") from None
        write_atomically(coordinator.folder / FILE_NAME, found)
    finally:
        shutil.rmtree(out, ignore_errors=True)  # the copies of the test patients too
    facts: dict[str, Any] = json.loads(found)
    return facts


def _flower_run(coordinator: Coordinator, run: RunFolder, *settings: str) -> None:
    """`flwr run` with a run folder, to its end; its log is shown as it comes.

    The list of the sites' nodes is written anew each time: a site may have been registered again, with another key.

    Raises:
        UserError: This is no source checkout, or Flower has another run that is not finished.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError(f"{ROOT} has no pyproject.toml: Flower packs its app from a source checkout, use one")
    _end_dead_runs(coordinator)
    numbers = node_ids(coordinator)
    write_nodes(run, {name: numbers[name] for name in read_study(run) if name in numbers})
    run_config = " ".join([f'run-dir="{run.path.resolve()}"', *settings])
    command = [f"{BIN}/flwr", "run", str(ROOT), CONNECTION, "--stream", "--run-config", run_config]
    subprocess.run(command, env=environment(coordinator), stdout=sys.stderr, cwd=coordinator.folder, check=False)


def _end_dead_runs(coordinator: Coordinator) -> None:
    """End runs whose ServerApp is gone: for a while after a crash Flower still counts them as running.

    Raises:
        UserError: A ServerApp is running, or a run does not end.
    """
    for entry in flower_runs(coordinator):
        if entry["status"].startswith("finished"):
            continue
        if entry["status"] == "pending" or serverapp_runs(coordinator):
            raise UserError(
                f"Flower's run {entry['run-id']} is at work: wait for it, or end it with 'fedcmr-server "
                f"stop {coordinator.folder}' and start again"
            )
        done = flwr(coordinator, "stop", str(entry["run-id"]), CONNECTION)
        left = {other["run-id"]: other["status"] for other in flower_runs(coordinator)}
        if not left.get(entry["run-id"], "finished").startswith("finished"):
            raise UserError(f"Flower does not end its run {entry['run-id']}: {(done.stdout + done.stderr)[-300:]}")


def flower_runs(coordinator: Coordinator) -> list[dict[str, Any]]:
    """Flower's list of its runs, newest first; empty where it cannot be reached."""
    return list(_json(coordinator, "ls").get("runs", []))


def status(coordinator: Coordinator, run: RunFolder | None) -> dict[str, Any]:
    """Status of the study.

    Returns:
        `services` ({name: running}), `healthy`, `sites` ({name: Flower's status, or "unknown"}), and with a run its
        `round`, `num_rounds`, `stages` done, `quorum`, `refused` and `dropped` ({site: code}) of the last rounds. For
        the last round: who `answered`, how many were `silent`, and how many replies were `missing` to the quorum. Also
        `participation`: who took part in the rounds so far, who refused with which code, who was silent.
    """
    up = healthy(coordinator)
    facts: dict[str, Any] = {
        "services": {name: running_pid(coordinator, name) is not None for name in (SUPERLINK, EXECUTOR)},
        "healthy": up,
        "sites": _sites_online(coordinator) if up else dict.fromkeys(coordinator.sites(), "unknown"),
    }
    if run is not None:
        rounds = run.rounds()
        last = rounds[-LAST_ROUNDS:]
        sites = read_study(run)
        facts["run"] = {
            "round": rounds[-1]["round"] if rounds else 0,
            "num_rounds": run.config.federation.num_rounds + run.config.federation.segmenter_rounds,
            "stages": sorted(run.stage_seconds()),
            "sites": len(sites),
            "quorum": quorum(run.config.federation, len(sites)),
            "participation": participation(rounds, sites),
            "answered": rounds[-1]["answered"] if rounds else [],
            "silent": rounds[-1]["silent"] if rounds else 0,
            "missing": rounds[-1]["missing"] if rounds else 0,
            "epsilon": rounds[-1]["epsilon"] if rounds else None,
            **{
                key: {site: code for line in last for site, code in line[key].items()} for key in ("refused", "dropped")
            },
        }
    return facts


def _sites_online(coordinator: Coordinator) -> dict[str, str]:
    """Every registered site with Flower's status of its node: registered, online or offline."""
    states = {node["node-id"]: node["status"] for node in _json(coordinator, "supernode", "list").get("nodes", [])}
    nodes = node_ids(coordinator)
    return {name: states.get(nodes.get(name, ""), "unknown") for name in coordinator.sites()}


def _json(coordinator: Coordinator, *command: str) -> dict[str, Any]:
    """The JSON of a Flower command; empty where it fails."""
    done = flwr(coordinator, *command, CONNECTION, "--format", "json")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
