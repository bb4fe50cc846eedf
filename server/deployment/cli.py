"""The coordinator's commands of `fedcmr-server`, from `init` and `register` to `run`, `status`, `poc` and `stop`."""

import argparse
import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedcmr.server.deployment.ports import DELIVERY_PORT, GATEWAY_PORT, HEALTH_PORT, SUPERLINK_PORT
from fedcmr.shared.case import VENDORS
from fedcmr.shared.console import plain_console
from fedcmr.shared.errors import UserError
from fedcmr.shared.provenance import PRIVATE, PUBLIC_SETS, parse
from fedcmr.shared.site_facts import parse_vendors

if TYPE_CHECKING:
    from fedcmr.server.deployment.coordinator import Coordinator

AddCommand = Callable[..., argparse.ArgumentParser]


def add_commands(add: AddCommand, positive: Callable[[str], int]) -> None:
    """Add them to the parser.

    Args:
        add: Takes name, function, help and description.
        positive: Parses a whole number from 1.
    """
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR", "help": "the coordinator's folder"}
    sub = add(
        "init",
        _init,
        "make the coordinator's folder of a study between institutions",
        "Writes a certificate authority, the server's certificate and coordinator.yaml. In a folder that is "
        "there, of the same name, it renews the server's certificate and keeps all else.",
    )
    sub.add_argument("folder", **folder)
    sub.add_argument("--name", required=True, help="the study's name: small letters, digits and '-'")
    sub.add_argument(
        "--address",
        required=True,
        nargs="+",
        metavar="HOST",
        help="names and IP addresses by which sites reach the server",
    )
    for option, port, what in (
        ("--port", SUPERLINK_PORT, "of the SuperLink"),
        ("--health-port", HEALTH_PORT, "of its health service, on this machine only"),
        ("--gateway-port", GATEWAY_PORT, "that sites call"),
        ("--delivery-port", DELIVERY_PORT, "of the service of synthetic data, behind the gateway"),
    ):
        sub.add_argument(option, type=positive, default=port, help=f"{what} (default: %(default)s)")

    sub = add(
        "gateway",
        _gateway,
        "write the gateway's nginx.conf again",
        "After a change of addresses or ports in coordinator.yaml; 'init' has written it first.",
    )
    sub.add_argument("folder", **folder)

    sub = add(
        "service",
        _service,
        "write the files that run the coordinator as services of this machine",
        "Hardened systemd units for SuperLink and gateway and the rotation of their logs; prints what an "
        "administrator does with them. Installs nothing.",
    )
    sub.add_argument("folder", **folder)
    sub.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write to; made where needed")
    sub.add_argument("--user", default="fedcmr", help="account that owns DIR and runs the units (default: %(default)s)")
    sub.add_argument(
        "--program",
        type=Path,
        metavar="PATH",
        help="fedcmr-server, where the units find it (default: the one installed here)",
    )
    sub.add_argument("--deliver", type=Path, metavar="RUN", help="also a unit that delivers this run's synthetic cases")
    sub.add_argument(
        "--nginx",
        type=Path,
        metavar="PATH",
        help="nginx, where the units find it (default: the one installed here, or /usr/sbin/nginx)",
    )

    sub = add("register", _register, "let a site take part", "Before the site's first 'fedcmr-client join'.")
    sub.add_argument("folder", **folder)
    sub.add_argument("key", type=Path, metavar="SITE.pub", help="the site's node_key.pub")
    sub.add_argument("--name", required=True, help="the site's, as in its site.yaml")
    sub.add_argument(
        "--vendor",
        required=True,
        nargs="+",
        metavar="V",
        help=f"one of {', '.join(VENDORS)}; of a site "
        "with several each with its own number, as in its site.yaml: Siemens=40 Philips=20",
    )
    sub.add_argument("--nominal-patients", required=True, type=positive, metavar="N", help="as in its site.yaml")
    sub.add_argument(
        "--provenance",
        default=PRIVATE,
        metavar="P",
        help="where its scans come from: private (real "
        f"patients), simulated, or public:NAME with NAME of {', '.join(PUBLIC_SETS)}; report and "
        "datasheet say it (default: %(default)s)",
    )

    sub = add(
        "remove",
        _remove,
        "take a site's key away: it left, or its key is lost",
        "It is refused at once, also in a run that is under way. What it has released before stays in the model.",
    )
    sub.add_argument("folder", **folder)
    sub.add_argument("--name", required=True, help="the site's")

    sub = add(
        "start",
        _start,
        "start the SuperLink and the ServerApp's executor",
        "In the background, over TLS; what runs already is left alone.",
    )
    sub.add_argument("folder", **folder)
    sub.add_argument(
        "--watch",
        action="store_true",
        help="stay until SIGTERM, then stop them; end with code 2 as soon "
        "as one of them ends, so that a supervisor such as systemd starts both again",
    )

    sub = add(
        "run",
        _run,
        "run a study over the registered sites, to its report",
        "With --resume it resumes after the last finished round, and no site is charged twice.",
        settings=True,
    )
    sub.add_argument("folder", **folder)
    sub.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: DIR/runs/CONFIG)")
    sub.add_argument(
        "--test",
        type=Path,
        nargs="+",
        default=[],
        metavar="CASES",
        help="folders of prepared public cases to evaluate the trained model on; for a new run folder. Sites "
        "evaluate it on their own test patients with evaluation.federated=true",
    )
    sub.add_argument("--resume", action="store_true", help="go on with the run folder that is there")
    sub.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="RUN",
        help="begin a new run, --out, from what this one has finished, with its settings, sites and test patients: for "
        "other settings of synthesis, regression, segmentation, tasks or evaluation, without a new round at the sites",
    )
    sub.add_argument(
        "--rehearsal",
        action="store_true",
        help="go the whole way with every site, from its connection "
        "to its budget, on invented patients: charges nothing, writes DIR/rehearsal.json, and ends with 0 "
        "where the study can start and with 2 and the reason where it cannot",
    )

    sub = add("status", _status, "tell which services run, which sites are online, and how far a run is", "")
    sub.add_argument("folder", **folder)
    sub.add_argument("--out", type=Path, metavar="RUN", help="run folder (default: the newest in DIR/runs)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--watch",
        action="store_true",
        help="show it anew as it changes, until the run has come to its report or Ctrl-C; with --json a line each time",
    )
    sub.add_argument(
        "--every", type=positive, default=10, metavar="SECONDS", help="how often --watch looks (default: %(default)s)"
    )

    sub = add(
        "poc",
        _poc,
        "rehearse a study between institutions on this machine, with simulated patients",
        "A coordinator, a SuperLink with TLS and several sites, each step by the command that a coordinator or a site "
        "would give; then a rehearsal, a small study and its report. No process is left, and of the files only what "
        "there is to read.",
        settings=True,
        config="smoke",
    )
    sub.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder")
    sub.add_argument("--sites", type=positive, default=3, metavar="N", help="number of sites (default: %(default)s)")
    sub.add_argument("--rehearsal", action="store_true", help="stop after the rehearsal, without a study")
    sub.add_argument("--stay", action="store_true", help="leave everything running at the end, until Ctrl-C")
    sub.add_argument("--keep", action="store_true", help="keep all files, keys and simulated patients too")

    sub = add("stop", _stop, "stop the services", "A run that is under way ends; 'run --resume' takes it up again.")
    sub.add_argument("folder", **folder)


def _init(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.authority import issue_server_certificate, make_authority
    from fedcmr.server.deployment.coordinator import COORDINATOR_FILE, Coordinator, load_coordinator, write_coordinator

    wanted = Coordinator(
        options.name,
        options.address,
        options.port,
        options.health_port,
        options.gateway_port,
        options.delivery_port,
        folder=options.folder,
    )
    if (options.folder / COORDINATOR_FILE).is_file():
        there = load_coordinator(options.folder)
        if there.name != options.name:
            raise UserError(f"{options.folder} is of study {there.name!r}: take a new folder")
        issue_server_certificate(options.folder, options.address)
        renewed = Coordinator(**{**vars(there), "addresses": options.address})
        write_coordinator(renewed)
        _write_gateway(renewed)
        print(f"renewed {options.folder / 'server.crt'}; restart the services and the gateway to use it")
        return
    if options.folder.exists() and any(options.folder.iterdir()):
        raise UserError(f"{options.folder} is not empty: give a new or empty folder")
    options.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_authority(options.folder, options.name)
    issue_server_certificate(options.folder, options.address)
    write_coordinator(wanted)
    _write_gateway(wanted)
    print(f"wrote {options.folder}; give every site ca.crt, keep ca.key and the other secrets here and in a backup")


def _write_gateway(coordinator: "Coordinator") -> Path:
    from fedcmr.server.deployment.gateway import write_gateway

    return write_gateway(
        coordinator.folder,
        coordinator.addresses,
        coordinator.gateway_port,
        coordinator.superlink_port,
        coordinator.delivery_port,
    )


def _gateway(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator

    path = _write_gateway(load_coordinator(options.folder))
    print(f"wrote {path}; 'systemctl reload fedcmr-gateway', or nginx -e stderr -c {path} where it is no service yet")


def _service(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.install import installed_programs, next_steps, service_files
    from fedcmr.shared.service_files import write_all

    coordinator = load_coordinator(options.folder)
    program, nginx = installed_programs()
    delivered = options.deliver and options.deliver.resolve()
    files = service_files(coordinator, options.user, options.program or program, options.nginx or nginx, delivered)
    for path in write_all(files, options.out):
        print(f"wrote {path}")
    print(next_steps(coordinator, options.user, options.out, delivers=delivered is not None))


def _register(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator, register_site
    from fedcmr.server.deployment.services import healthy, tell_flower
    from fedcmr.server.federation.state import StudySite

    coordinator = load_coordinator(options.folder)
    try:
        key = options.key.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{options.key} cannot be read: give the site's node_key.pub") from None
    vendors = parse_vendors(options.vendor, options.nominal_patients)
    facts = StudySite(vendors, options.nominal_patients, parse(options.provenance))
    register_site(coordinator, options.name, key, facts)
    if healthy(coordinator):
        tell_flower(coordinator)
    print(
        f"registered {options.name}, {', '.join(vendors)}, {options.nominal_patients} nominal patients, "
        f"{facts.provenance.terms or facts.provenance.kind}"
    )


def _remove(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.services import forget_site

    forget_site(load_coordinator(options.folder), options.name)
    print(f"removed {options.name}; with another key it may be registered again")


def _start(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.services import start, watch

    over = threading.Event()
    if options.watch:
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: over.set())
    coordinator = load_coordinator(options.folder)
    start(coordinator)
    sites = len(coordinator.sites())
    print(
        f"the SuperLink serves {coordinator.host}:{coordinator.superlink_port} for {sites} registered site(s)",
        flush=True,
    )
    if options.watch:
        watch(coordinator, over)


def _run(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.runs import make_run, require_services, run_study
    from fedcmr.server.experiments.continuation import begin_from
    from fedcmr.server.experiments.preconditions import check_can_run
    from fedcmr.server.federation.evaluation import federated_results, federated_table
    from fedcmr.server.report.collect import who_took_part
    from fedcmr.server.run_folder import CONFIG_NAME, load_run
    from fedcmr.server.settings import load

    coordinator = load_coordinator(options.folder)
    if options.earlier is not None and (options.out is None or options.test or options.rehearsal):
        raise UserError("--from takes sites and test patients of RUN: give --out, and leave --test and --rehearsal out")
    if options.rehearsal:
        _rehearse(coordinator, options)
        return
    out = (options.out or coordinator.folder / "runs" / Path(options.config).stem).resolve()
    there = (out / "config.yaml").is_file()
    if there and not options.resume:
        raise UserError(f"{out} is there: --resume continues it, another --out begins anew")
    if not there and options.resume:
        raise UserError(f"{out} holds no run to go on with: leave --resume out")
    if not there and options.earlier is not None:
        require_services(coordinator)
        config = load(options.given_config or options.earlier / CONFIG_NAME, options.settings)
        check_can_run(config)
        begin_from(options.earlier, out, config)
    elif not there:
        make_run(coordinator, out, options.config, options.settings, options.test)
    run_study(coordinator, out)
    results = federated_results(load_run(out))
    if results is not None:
        plain_console().print(federated_table(results))
    for sentence in who_took_part(load_run(out)):
        print(sentence)
    print(f"finished: {out / 'report.html'}")


def _rehearse(coordinator: "Coordinator", options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.runs import rehearse_study
    from fedcmr.server.rehearsal.rehearsal import show

    if options.resume or options.out is not None:
        raise UserError("--rehearsal has a run folder of its own: leave --resume and --out out")
    show(rehearse_study(coordinator, options.config, options.settings, options.test))


def _status(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.runs import status
    from fedcmr.server.run_folder import load_run

    coordinator = load_coordinator(options.folder)

    def look() -> tuple[dict[str, Any], Path | None]:
        newest = max((coordinator.folder / "runs").glob("*/config.yaml"), key=lambda p: p.stat().st_mtime, default=None)
        out = options.out or (newest and newest.parent)
        return status(coordinator, load_run(out) if out else None), out

    if options.watch:
        _watch(look, options.every, options.json)
        return
    facts, out = look()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _console().print(_table(facts, out))


def _watch(look: Callable[[], tuple[dict[str, Any], Path | None]], every_s: float, as_json: bool) -> None:
    """Show the status anew whenever it has changed, until the run is finished or Ctrl-C."""
    console, shown = _console(), None
    with contextlib.suppress(KeyboardInterrupt), ExitStack() as stack:
        live = stack.enter_context(Live(console=console)) if console.is_terminal and not as_json else None
        while True:
            facts, out = look()
            if live is not None:
                live.update(_table(facts, out), refresh=True)
            elif facts != shown and as_json:
                print(json.dumps(facts), flush=True)
            elif facts != shown:
                console.print(time.strftime("%Y-%m-%d %H:%M:%S"), _table(facts, out))
            shown = facts
            if "report" in facts.get("run", {}).get("stages", ()):
                return
            time.sleep(every_s)


def _console() -> Console:
    return plain_console()


def _table(facts: dict[str, Any], out: Path | None) -> Table:
    table = Table(show_header=False)
    for name, value in _lines(facts, out):
        table.add_row(name, value)
    return table


def _poc(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.poc import Poc, run_poc

    poc = Poc(options.folder, options.sites, options.config, options.settings)
    run_poc(poc, options.rehearsal, options.stay, options.keep)
    print(f"went the whole way; {poc.folder} has what there is to read, commands.txt first")


def _lines(facts: dict[str, Any], out: Path | None) -> list[tuple[str, str]]:
    """What `status` found, for people."""
    from fedcmr.server.federation.participation import sentences

    lines = [(name, "runs" if runs else "does not run") for name, runs in facts["services"].items()]
    lines.append(("health", "the SuperLink answers" if facts["healthy"] else "the SuperLink does not answer"))
    lines += [(f"site {name}", state) for name, state in facts["sites"].items()]
    if "run" in facts:
        run = facts["run"]
        epsilon = "" if run["epsilon"] is None else f", epsilon {run['epsilon']:.2f}"
        lines.append(
            (
                f"run {out}",
                f"round {run['round']} of {run['num_rounds']}, {len(run['answered'])} of "
                f"{run['sites']} sites answered ({run['quorum']} are needed){epsilon}",
            )
        )
        if run["silent"]:
            lines.append(("  no answer", f"of {run['silent']} in the last round"))
        if run["missing"]:
            lines.append(("  missing", f"{run['missing']} more were needed in the last round, which changed nothing"))
        lines += [(f"  {site}", f"refused: {code}") for site, code in run["refused"].items()]
        lines += [(f"  {site}", f"dropped: {code}") for site, code in run["dropped"].items()]
        if run["round"]:
            lines += [("  so far", sentence) for sentence in sentences(run["participation"])]
        lines.append(("  done", ", ".join(run["stages"]) or "nothing yet"))
    return lines


def _stop(options: argparse.Namespace) -> None:
    from fedcmr.server.deployment.coordinator import load_coordinator
    from fedcmr.server.deployment.services import stop

    ended = stop(load_coordinator(options.folder))
    print(f"stopped {', '.join(ended)}" if ended else "nothing was running")
