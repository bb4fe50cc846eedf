"""The commands of `fedcmr-server` that deliver synthetic cases: deliver, token."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from fedcmr.server.deployment.ports import DELIVERY_PORT
from fedcmr.shared.errors import UserError

AddCommand = Callable[..., argparse.ArgumentParser]
MAX_ON_DEMAND = 10_000
WARN_DAYS = 30


def add_commands(add: AddCommand, positive: Callable[[str], int]) -> None:
    """Add them to the parser.

    Args:
        add: Takes name, function, help and description.
        positive: Parses a whole number from 1.
    """
    sub = add(
        "deliver",
        _deliver,
        "serve a run's synthetic cases to partners who have a token",
        "Over TLS (gRPC), until it is stopped; partners use 'fedcmr-client fetch'. The released set is served, "
        "and new cases of the run's generator, which cost no further privacy. What was requested by whom stands "
        "in DIR/logs/delivery.log.",
    )
    sub.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    sub.add_argument(
        "--folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="the coordinator's: server.crt, server.key, delivery/tokens.json",
    )
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; %(default)s, the default, is for a "
        "gateway on this machine, 0.0.0.0 for all networks",
    )
    sub.add_argument(
        "--port",
        type=_port,
        help=f"0 takes a free one (default: delivery_port of DIR's coordinator.yaml, or {DELIVERY_PORT})",
    )
    sub.add_argument(
        "--on-demand",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also make new cases on demand (default: --on-demand)",
    )
    sub.add_argument(
        "--max-on-demand",
        type=positive,
        default=MAX_ON_DEMAND,
        metavar="N",
        help="most new cases of one call (default: %(default)s)",
    )
    # Their names in version 0.1.
    sub.add_argument("--fresh", dest="on_demand", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    sub.add_argument("--max-fresh", dest="max_on_demand", type=positive, help=argparse.SUPPRESS)
    sub.add_argument(
        "--without-privacy", action="store_true", help="serve a run that was trained without differential privacy"
    )

    sub = add(
        "token",
        _token,
        "give a site a token for 'fedcmr-client fetch', or take it away",
        "The folder keeps the token's SHA-256 and not the token: it is shown or written once. A new token "
        "replaces the site's earlier one at once, also in a running service.",
    )
    sub.add_argument("folder", type=Path, metavar="DIR", help="the coordinator's folder")
    sub.add_argument("--site", required=True, metavar="NAME", help="whose token it is")
    sub.add_argument(
        "--out", type=Path, metavar="FILE", help="new file for the token, for this user's eyes only (default: print it)"
    )
    sub.add_argument("--revoke", action="store_true", help="take the site's token away")


def _deliver(options: argparse.Namespace) -> None:
    from fedcmr.server.delivery.on_demand import load_sampler
    from fedcmr.server.delivery.released_set import open_released_set
    from fedcmr.server.delivery.serve import Service
    from fedcmr.server.delivery.service import Offer
    from fedcmr.server.federation.outcome import privacy_spent
    from fedcmr.server.run_folder import load_run

    run = load_run(options.run)
    spent = privacy_spent(run)
    if spent["epsilon"] is None and not options.without_privacy:
        raise UserError(
            f"{run.path} was trained without differential privacy: its cases may show patients; "
            "--without-privacy serves them all the same"
        )
    guarantee = (
        "none: trained without differential privacy"
        if spent["epsilon"] is None
        else f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} for {spent['unit']}"
    )
    released = open_released_set(run.path / "synthetic")
    sampler = load_sampler(run) if options.on_demand else None
    port = _delivery_port(options.folder) if options.port is None else options.port
    offer = Offer(run.path.resolve().name, guarantee, released, sampler, options.max_on_demand)
    with Service(options.folder, offer, options.host, port) as service:
        if service.days_left < WARN_DAYS:
            print(f"the server's certificate is valid for {service.days_left} more days: renew it", file=sys.stderr)
        print(
            f"serving {len(released.entries)} cases of {offer.study}{' and new ones on demand' if sampler else ''} at "
            f"{options.host}:{service.port}; privacy: {guarantee}",
            flush=True,
        )
        service.wait()
        print("ending: running streams may finish what they send", file=sys.stderr)


def _token(options: argparse.Namespace) -> None:
    from fedcmr.server.delivery.tokens import issue_token, revoke_token
    from fedcmr.server.deployment.authority import write_secret

    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is no folder: 'fedcmr-server init' makes it")
    if options.revoke:
        if options.out:
            raise UserError("Expected --revoke without --out.")
        revoke_token(options.folder, options.site)
        print(f"{options.site} can fetch no more")
        return
    if options.out and (options.out.exists() or not options.out.parent.is_dir()):
        raise UserError(f"Expected --out to be a new file in an existing folder, got {options.out}.")
    token = issue_token(options.folder, options.site)
    if options.out is None:
        print(token)
        return
    write_secret(options.out, f"{token}\n".encode())
    print(f"wrote {options.out}: bring it to {options.site} by a way that nobody reads, then remove it here")


def _delivery_port(folder: Path) -> int:
    """The delivery port in the coordinator's settings, which the gateway uses too."""
    from fedcmr.server.deployment.coordinator import COORDINATOR_FILE, load_coordinator

    return load_coordinator(folder).delivery_port if (folder / COORDINATOR_FILE).is_file() else DELIVERY_PORT


def _port(text: str) -> int:
    """A port number, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port in 0..65535, got {text!r}")
    return int(text)
