"""A site's commands of `fedcmr-client` in a study between institutions, and `check` of its folder."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedcmr.shared.console import plain_console
from fedcmr.shared.errors import UserError


def add_commands(commands: Any) -> None:
    """Add them to the parser's sub-commands."""
    sub = commands.add_parser(
        "join",
        help="take part in a deployed study until it is stopped",
        description="Runs Flower's SuperNode, and starts it again when it ends. Refuses to start "
        "where 'check SITE_FOLDER' finds a problem, and waits for a coordinator that is not up yet. Tells what the "
        "site answers and refuses; Flower's own output goes to SITE_FOLDER/flwr/supernode.log.",
    )
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder of site.yaml")
    sub.add_argument(
        "--cold",
        action="store_true",
        help="load the libraries anew for every message: slower, and no gigabyte of memory between them",
    )
    sub.add_argument(
        "--wait",
        type=_minutes,
        default=60.0,
        metavar="MINUTES",
        help="how long to wait for a coordinator that is not reached; 0: not at all (default: %(default)g)",
    )
    sub.set_defaults(command=_join)

    sub = commands.add_parser(
        "status",
        help="whether the site is joined, what it answered and refused, and what is left of its budget",
        description="From the site's own files alone; nothing is sent.",
    )
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder of site.yaml")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.set_defaults(command=_status)

    sub = commands.add_parser(
        "service",
        help="write the files that run 'join' as a service of this machine",
        description="Writes a hardened systemd unit, or a Dockerfile and a compose file, for one "
        "site, and prints what an administrator does with them. Installs nothing.",
    )
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder of site.yaml, where the service finds it")
    sub.add_argument("--kind", required=True, choices=("systemd", "compose"), help="a unit, or a container")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to; made where needed")
    sub.add_argument("--user", default="fedcmr", help="account that the unit runs as (default: %(default)s)")
    sub.add_argument(
        "--program",
        type=Path,
        metavar="PATH",
        help="fedcmr-client, where the unit finds it (default: the one installed here)",
    )
    sub.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="address or network of the "
        "coordinator, and no other may be called; for a unit, may be given again (default: the one in "
        "site.yaml, or any where that is a name)",
    )
    sub.set_defaults(command=_service)

    sub = commands.add_parser(
        "key",
        help="make the site's key for a deployed study, once",
        description="Writes SITE_FOLDER/node_key, which never leaves the site, and node_key.pub, "
        "which the coordinator registers.",
    )
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder of site.yaml")
    sub.set_defaults(command=_key)


def check_site(folder: Path, as_json: bool, console: Console) -> None:
    """Print whether a site can join: what was looked at, and the remedy of what is wrong.

    Raises:
        UserError: Something is wrong.
    """
    from fedcmr.client.deployment.connection import examine
    from fedcmr.client.policy import load_site

    findings = examine(load_site(folder))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "", "finding")
        for finding in findings:
            table.add_row(finding.name, Text("ok") if finding.ok else Text("wrong", "red"), finding.text)
        console.print(table)
    troubles = [finding.name for finding in findings if not finding.ok]
    if troubles:
        raise UserError(f"{folder}: to be put right before the site can join: {', '.join(troubles)}")


def _join(options: argparse.Namespace) -> None:
    """Run the SuperNode."""
    from fedcmr.client.deployment.supernode import join
    from fedcmr.client.policy import load_site

    join(load_site(options.site), preforked=not options.cold, wait_minutes=options.wait)


def _minutes(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes from 0, got {text!r}")
    return value


def _status(options: argparse.Namespace) -> None:
    """Print how the site stands."""
    from fedcmr.client.policy import load_site
    from fedcmr.client.status import print_status, read_status

    status = read_status(load_site(options.site))
    if options.json:
        print(json.dumps(status, indent=2, allow_nan=False))
    else:
        print_status(status, plain_console())


def _service(options: argparse.Namespace) -> None:
    """Write a service's files."""
    from fedcmr.client.deployment.install import installed_program, next_steps, service_files
    from fedcmr.client.policy import load_site
    from fedcmr.shared.service_files import write_all

    site = load_site(options.site)
    program = options.program or installed_program()
    for path in write_all(service_files(site, options.kind, options.user, program, options.allow), options.out):
        print(f"wrote {path}")
    print(next_steps(site, options.kind, options.user, options.out))


def _key(options: argparse.Namespace) -> None:
    """Make the site's key."""
    from fedcmr.client.deployment.node_key import make_node_key
    from fedcmr.client.policy import load_site

    print(
        f"send {make_node_key(load_site(options.site).folder)} to the coordinator, with the site's name, vendors and "
        "nominal patients"
    )
