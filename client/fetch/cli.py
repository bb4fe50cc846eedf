"""`fedcmr-client fetch`: its options, and what it prints."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedcmr.shared.case import VENDORS
from fedcmr.shared.command_parser import CommandParser
from fedcmr.shared.console import plain_console
from fedcmr.shared.errors import UserError
from fedcmr.shared.site_facts import vendor_argument

if TYPE_CHECKING:
    from fedcmr.client.fetch.source import Source

PATIENCE_S = 300.0
TOKEN_NAME = "delivery.token"  # noqa: S105 - the name of its file


def add_fetch(commands: "argparse._SubParsersAction[CommandParser]", positive: Callable[[str], int]) -> None:
    """Add the command.

    Args:
        commands: Subcommands of the parser.
        positive: Parses a whole number from 1.
    """
    sub = commands.add_parser(
        "fetch",
        help="bring synthetic cases from the study's coordinator",
        description="Into a folder of cases like those of 'prepare', with the set's datasheet. "
        "Resumes by itself after a broken connection; the same command again resumes where an "
        "earlier one stopped. Every case is checked before it is kept.",
    )
    sub.add_argument("out", type=Path, metavar="DIR", help="new or empty folder, or one to resume")
    sub.add_argument("--from", required=True, dest="address", metavar="HOST:PORT", help="the delivery service")
    sub.add_argument(
        "--site",
        type=Path,
        metavar="SITE_FOLDER",
        help="folder of site.yaml, which names the authority; "
        f"the token is its {TOKEN_NAME}; or give both by the next two",
    )
    sub.add_argument("--ca", type=Path, metavar="FILE", help="the coordinator's ca.crt")
    sub.add_argument("--token-file", type=Path, metavar="FILE", help="the site's token, readable by this user alone")
    sub.add_argument(
        "--vendor",
        action="append",
        default=[],
        type=vendor_argument,
        metavar="V",
        help=f"cases of this style only, may be given again; one of {', '.join(VENDORS)}",
    )
    sub.add_argument(
        "--ef",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="cases of ejection fractions in this range only, for example 0.1 0.35",
    )
    sub.add_argument(
        "--on-demand",
        type=positive,
        default=0,
        metavar="N",
        help="N new cases made for this call, instead of those of the released set",
    )
    sub.add_argument("--fresh", dest="on_demand", type=positive, help=argparse.SUPPRESS)  # its name in version 0.1
    sub.add_argument(
        "--seed", type=int, help="of cases made on demand: the same seed gives the same cases (default: 0)"
    )
    sub.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="how long to try again while nothing comes (default: %(default)g)",
    )
    sub.set_defaults(command=_fetch)


def _fetch(options: argparse.Namespace) -> None:
    # Imported here: gRPC takes a while to load, and no other command of a site without a deployment needs it.
    from fedcmr.client.fetch.fetch import Query, check_ef, fetch
    from fedcmr.shared.delivery.contract import MAX_SEED

    if options.seed is not None and not options.on_demand:
        raise UserError("Expected --seed with --on-demand only: the released set is always the same.")
    if not 0 <= (options.seed or 0) <= MAX_SEED:
        raise UserError(f"Expected --seed in 0..{MAX_SEED}, got {options.seed}.")
    if not 0 <= options.patience < float("inf"):
        raise UserError(f"Expected --patience >= 0, got {options.patience:g}.")
    query = Query(
        tuple(sorted(set(options.vendor))),
        check_ef(*options.ef) if options.ef else None,
        options.on_demand,
        options.seed or 0,
    )
    fetched = fetch(_source(options), options.out, query, options.patience)
    plain_console().print(
        f"{fetched.num_cases} synthetic cases of {fetched.study} in {options.out}; privacy: {fetched.privacy}",
        soft_wrap=True,
        markup=False,
    )


def _source(options: argparse.Namespace) -> "Source":
    """Where from, by --site or by --ca and --token-file."""
    from fedcmr.client.fetch.source import Source

    ca, token_file = options.ca, options.token_file
    if options.site is not None:
        from fedcmr.client.policy import SITE_FILE, load_site

        site = load_site(options.site)
        ca, token_file = ca or site.authority_path, token_file or site.folder / TOKEN_NAME
        if ca is None:
            raise UserError(f"{site.folder / SITE_FILE}: expected authority: the coordinator's ca.crt; or give --ca")
    if ca is None or token_file is None:
        raise UserError("Expected --ca and --token-file, or --site SITE_FOLDER.")
    return Source(options.address, ca, token_file)
