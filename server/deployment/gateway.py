"""The gateway: an nginx before the SuperLink that lets through what SuperNodes and the delivery service need.

Flower 1.41 and 1.42 serve the Fleet, Control and Runtime APIs on one port, and the Control API has no login: whoever
reaches it may start code at every site. So the SuperLink listens on the loopback interface only, and nginx is all that
is reachable from outside.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedcmr.server.deployment.ports import DELIVERY_PORT, GATEWAY_PORT, SUPERLINK_PORT
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.service_files import render

TEMPLATES = Path(__file__).parent / "templates"
FLEET_PATHS = (
    # Called by flwr/supernode/fleet_http_connection.py, spelt in flwr/supernode/fleet_http_client.py; the same in
    # 1.41.0 and 1.42.0. `tests/deployment/test_gateway_paths.py` fails when the installed flwr calls another one.
    "/v1/fleet/activate-node",  # http_request_response, once at the start
    "/v1/fleet/deactivate-node",  # http_request_response, once at the end
    "/v1/fleet/send-node-heartbeat",  # send_node_heartbeat, about every 25 s
    "/v1/fleet/pull-messages",  # receive, every three seconds
    "/v1/fleet/get-run",  # get_run
    "/v1/fleet/get-fab",  # get_fab: the bundle of code
    "/v1/fleet/pull-object",  # pull_object: the arrays of a message, in chunks of up to 5 MiB
    "/v1/fleet/confirm-message-received",  # confirm_message_received
    "/v1/fleet/push-messages",  # send
    "/v1/fleet/push-object",  # push_object
)
"""Requests of a SuperNode that authenticates with a registered key."""

KEYLESS_PATHS = ("/v1/fleet/register-node", "/v1/fleet/unregister-node")
"""Called by SuperNodes without a key only (`self_registered`); a study has none, so these stay closed."""

DELIVERY_PATHS = (
    "/grpc.health.v1.Health/Check",  # `Watch` would hold a connection for nothing
    "/fedcmr.delivery.v1.Delivery/Describe",  # shared/delivery/delivery.proto has the service's methods
    "/fedcmr.delivery.v1.Delivery/Stream",
    "/fedcmr.delivery.v1.Delivery/Sample",
)
"""gRPC methods of the delivery service, POST over HTTP/2."""

HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z")


@dataclass(frozen=True)
class Limits:
    """Limits for one address at the gateway: many times what a site needs.

    Attributes:
        requests_per_s: Average number of requests per second. An idle SuperNode makes one request a second.
        burst: Requests allowed at once above the average. A round pulls and pushes each array as one or two objects,
            8 at a time.
        connections: Concurrent connections; an HTTP/2 stream counts as one. Several sites may share an address.
        max_body_bytes: Largest request body in bytes. flwr cuts arrays into objects of up to 5 MiB.
        max_ask_bytes: Largest request to the delivery service in bytes; its replies have no limit.
    """

    requests_per_s: int = 100
    burst: int = 2000
    connections: int = 100
    max_body_bytes: int = 8 * 2**20
    max_ask_bytes: int = 64 * 2**10


def write_gateway(
    study: Path,
    addresses: Sequence[str],
    gateway_port: int = GATEWAY_PORT,
    superlink_port: int = SUPERLINK_PORT,
    delivery_port: int = DELIVERY_PORT,
    listen: Sequence[str] | None = None,
    limits: Limits | None = None,
) -> Path:
    """Write `study/gateway/nginx.conf`, replacing an earlier one.

    Args:
        study: The coordinator's folder, with `ca.crt`, `server.crt` and `server.key`.
        addresses: Public names and addresses by which the sites call the coordinator.
        gateway_port: The one public port.
        superlink_port: Port of the SuperLink on 127.0.0.1.
        delivery_port: Port of the delivery service on 127.0.0.1.
        listen: Interfaces to listen on, as nginx spells them; None for all.
        limits: Limits for each address; None for the defaults.

    Returns:
        The file's path. `nginx -c PATH` starts it, as any user who may read `server.key` and bind the port.

    Raises:
        UserError: An address, a port, the folder's name or the server's certificate cannot be used.
    """
    ports = {"gateway_port": gateway_port, "superlink_port": superlink_port, "delivery_port": delivery_port}
    for name, port in ports.items():
        if not 1 <= port <= 65535:
            raise UserError(f"Expected {name} in 1..65535, got {port}.")
    if len(set(ports.values())) < len(ports):
        raise UserError(f"Expected three different ports, got {ports}.")
    if not addresses:
        raise UserError("Expected at least one public name or address of the coordinator, got none.")
    study = Path(study).resolve()
    if re.search(r'["\\$\x00-\x1f]', str(study)):
        raise UserError(f"{study}: nginx cannot read a path with quotes, backslashes or $; use another folder")
    folder = study / "gateway"
    (folder / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
    values = {
        "folder": folder,
        "authority": study / "ca.crt",
        "certificate": study / "server.crt",
        "key": study / "server.key",
        "upstream_name": _dns_name(study / "server.crt"),
        "names": [_server_name(address) for address in addresses],
        "gateway_port": gateway_port,
        "superlink": f"127.0.0.1:{superlink_port}",
        "delivery": f"127.0.0.1:{delivery_port}",
        "listen": _all_interfaces() if listen is None else listen,
        "fleet_paths": FLEET_PATHS,
        "delivery_paths": DELIVERY_PATHS,
        **vars(limits or Limits()),
    }
    path = folder / "nginx.conf"
    write_atomically(path, render(TEMPLATES, "nginx.conf.j2", values).encode())
    return path


def _server_name(address: str) -> str:
    """An address as it stands in a Host header, without the port.

    Raises:
        UserError: It is neither a host name nor an IP address.
    """
    try:
        parsed = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        if HOST_NAME.match(address.lower()):
            return address.lower()
        raise UserError(f"Expected an address like study.example.org or 192.0.2.7, got {address!r}.") from None
    return f"[{parsed}]" if parsed.version == 6 else str(parsed)


def _dns_name(certificate: Path) -> str:
    """The name by which nginx checks the SuperLink's certificate: it compares names only, never IP addresses.

    Raises:
        UserError: There is no certificate, or none with a name.
    """
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise UserError(
            f"{certificate}: expected the server's certificate with its names: 'fedcmr-server init' makes it"
        ) from None
    dns_names = [name for name in names.get_values_for_type(x509.DNSName) if HOST_NAME.match(name)]
    if not dns_names:
        raise UserError(
            f"{certificate}: expected at least one host's name next to the IP addresses, such as localhost; "
            "make it again with 'fedcmr-server init'"
        )
    return "localhost" if "localhost" in dns_names else dns_names[0]


def _all_interfaces() -> tuple[str, ...]:
    """All IPv4 addresses, and all IPv6 ones where this machine has IPv6: without it nginx would not start on them."""
    if socket.has_ipv6:
        try:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                probe.bind(("::1", 0))
            return ("0.0.0.0", "[::]")  # noqa: S104 - the gateway is what sites reach
        except OSError:
            pass
    return ("0.0.0.0",)  # noqa: S104
