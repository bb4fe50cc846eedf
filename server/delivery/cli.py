"""The delivery's commands of `fedcmr-server`: token, deliver."""

import argparse
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from shared.errors import UserError

AddCommand = Callable[..., argparse.ArgumentParser]
GRACE_S = 5.0


def add_commands(add: AddCommand, positive: Callable[[str], int]) -> None:
    """Add them to the parser; see `server.deployment.cli.add_commands`."""
    sub = add("token", _token, "let a site fetch synthetic patients, or no longer",
              "The token is written to a file that only this user can read; here only its hash stays.")  # fmt: skip
    sub.add_argument("folder", type=Path, metavar="DIR", help="the coordinator's folder")
    sub.add_argument("--site", required=True, metavar="NAME", help="whose token it is")
    action = sub.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="new file for the token")
    action.add_argument("--revoke", action="store_true", help="void the site's token")

    sub = add("deliver", _deliver, "deliver a synthetic data set to the sites, until it is stopped",
              "gRPC over TLS with the certificate of 'init'; only calls with a token are answered.")  # fmt: skip
    sub.add_argument("folder", type=Path, metavar="DIR", help="the coordinator's folder")
    sub.add_argument("--data", type=Path, required=True, metavar="SET", help="data set, as RUN/synthetic")
    sub.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s, behind the gateway)")
    sub.add_argument("--port", type=positive, default=8444, help="default: %(default)s")


def _token(options: argparse.Namespace) -> None:
    """Issue or void a token."""
    from server.delivery.tokens import issue_token, revoke_token
    from server.deployment.authority import write_secret
    from server.deployment.coordinator import load_coordinator

    folder = load_coordinator(options.folder).folder
    if options.revoke:
        revoke_token(folder, options.site)
        print(f"the token of {options.site} is void")
        return
    if options.out.exists():
        raise UserError(f"{options.out} exists: give a new file as --out")
    write_secret(options.out, (issue_token(folder, options.site) + "\n").encode())
    print(f"wrote {options.out}: send it to {options.site} on a safe way, then delete it here")


def _deliver(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    from server.delivery.service import DeliveryService, make_server
    from server.deployment.coordinator import load_coordinator

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = load_coordinator(options.folder).folder
    service = DeliveryService(options.data, folder)
    address = f"{options.host}:{options.port}"
    server, _ = make_server(service, folder / "server.crt", folder / "server.key", address)
    over = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: over.set())
    server.start()
    print(f"delivering {len(service.infos)} synthetic patients at {address}", flush=True)
    over.wait()
    server.stop(GRACE_S).wait()
