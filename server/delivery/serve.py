"""The running service: TLS, the interceptor, health, and an end that lets streams finish their case."""

import datetime
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedcmr.server.delivery.access_log import AuditLog
from fedcmr.server.delivery.interceptor import (
    CALLS_IN_ALL,
    CALLS_PER_SITE,
    CHECKS_IN_ALL,
    WAITING_IN_ALL,
    TokenInterceptor,
)
from fedcmr.server.delivery.service import Delivery, Offer
from fedcmr.server.delivery.tokens import TokenBook, read_tokens, tokens_path
from fedcmr.shared.delivery.contract import MAX_MESSAGE_BYTES, SERVICE
from fedcmr.shared.delivery.delivery_pb2_grpc import add_DeliveryServicer_to_server
from fedcmr.shared.errors import UserError

THREADS = CALLS_IN_ALL + WAITING_IN_ALL + CHECKS_IN_ALL + 8
"""One for every call being served, for every silent call and health check, and some to refuse the others."""
MAX_REQUEST_BYTES, MAX_METADATA_BYTES = 64 * 1024, 8 * 1024
STOP_S = 5.0
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second service on the port is an error, not a lottery
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", CALLS_PER_SITE + 4),
    # A peer that is gone is noticed within 90 s; one that reads nothing is disconnected after two hours.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 15_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
)


class Service:
    """A started service; `with` ends it.

    Attributes:
        port: TCP port on which it listens.
        days_left: Days for which its certificate is still valid.
    """

    def __init__(self, folder: Path, offer: Offer, host: str, port: int):
        """Start it.

        Args:
            folder: The coordinator's folder, with server.crt, server.key and delivery/tokens.json.
            offer: What it delivers.
            host: Address to listen on.
            port: TCP port; 0 takes a free one.

        Raises:
            UserError: A file is missing or does not fit, or the port is in use.
        """
        credentials, self.days_left = _credentials(folder)
        read_tokens(tokens_path(folder))
        interceptor = TokenInterceptor(TokenBook(folder), AuditLog(folder))
        self._server = grpc.server(
            ThreadPoolExecutor(THREADS),
            interceptors=[interceptor],
            options=OPTIONS,
            maximum_concurrent_rpcs=THREADS * 4,
        )
        add_DeliveryServicer_to_server(Delivery(offer), self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_secure_port(place, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise UserError(f"{place} cannot be listened on: is it in use? Give another --port or --host")
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def wait(self) -> None:
        """Wait for Ctrl-C or SIGTERM."""
        with suppress(KeyboardInterrupt):
            self._server.wait_for_termination()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self._health.enter_graceful_shutdown()
        self._server.stop(grace=STOP_S).wait()


def _credentials(folder: Path) -> tuple[grpc.ServerCredentials, int]:
    """TLS credentials from the folder's certificate, and the days for which it is still valid."""
    certificate, key = folder / "server.crt", folder / "server.key"
    again = "'fedcmr-server init' writes both"
    try:
        if key.stat().st_mode & 0o077:
            raise UserError(f"{key} can be read by others: correct it with 'chmod 600 {key}'")
        content = certificate.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        left = x509.load_pem_x509_certificate(content).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        private = key.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder}: expected server.crt and server.key; {again}") from None
    except (OSError, ValueError):
        raise UserError(f"{certificate} and {key.name} cannot be read or do not belong together; {again}") from None
    if left.total_seconds() <= 0:
        raise UserError(f"{certificate} has expired: 'fedcmr-server init' with the same name renews it")
    return grpc.ssl_server_credentials([(private, content)]), left.days
