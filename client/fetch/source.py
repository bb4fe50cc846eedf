"""The way to a delivery service: TLS that trusts the study's authority alone, the site's token, and errors in words."""

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509

from fedcmr.shared.delivery.contract import MAX_MESSAGE_BYTES
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryStub
from fedcmr.shared.errors import UserError

TOKEN = re.compile(r"[A-Za-z0-9_-]{20,200}")
HANDSHAKE_S = 10.0
MAX_WORDS = 200
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A server that has died without a word is noticed within 40 seconds.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # How often to call again is ours to say: a broken stream resumes after its last whole case.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class Broken(Exception):  # noqa: N818
    """A call that failed in a way that may pass; says how, on one line."""


@dataclass(frozen=True)
class Source:
    """Where the cases come from.

    Attributes:
        address: HOST:PORT.
        ca: File of the study's certificate authority.
        token_file: File of the site's token.
    """

    address: str
    ca: Path
    token_file: Path

    def host_and_port(self) -> tuple[str, int]:
        """Both parts of the address.

        Raises:
            UserError: It has no such parts.
        """
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise UserError(f"Expected --from HOST:PORT, got {self.address!r}.")
        return host.strip("[]"), int(port)


@contextmanager
def connected(source: Source) -> Iterator[DeliveryStub]:
    """Calls to the service, each with the token; no connection is made before the first.

    Raises:
        UserError: A file is not as expected.
    """
    source.host_and_port()
    try:
        authority = source.ca.read_bytes()
        x509.load_pem_x509_certificate(authority)
    except (OSError, ValueError):
        raise UserError(f"{source.ca} holds no certificate: expected the coordinator's ca.crt") from None
    # The token rides on the channel's credentials, so that it cannot be sent but over TLS.
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority), grpc.access_token_call_credentials(_read_token(source.token_file))
    )
    with grpc.secure_channel(source.address, credentials, OPTIONS) as channel:
        yield DeliveryStub(channel)


def trouble_of(error: grpc.RpcError, source: Source) -> Broken | UserError:
    """What a failed call means: an error that may pass, or one that needs a remedy."""
    code, words = error.code(), clean(error.details() or "")
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            return UserError(
                f"{source.token_file}: {source.address} does not accept this token; the coordinator "
                "makes a new one with 'fedcmr-server token'"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return UserError(f"{source.address} is no delivery service of this version: is the port right?")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in words:
            return UserError(
                f"{source.address} sends messages of more than {MAX_MESSAGE_BYTES} bytes, which no "
                "delivery service does: tell the coordinator"
            )
        case grpc.StatusCode.INTERNAL if "deserializing" in words:
            return UserError(f"{source.address} sends what cannot be read: is it of another version?")
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.DATA_LOSS
            | grpc.StatusCode.OUT_OF_RANGE
        ):
            return UserError(f"{source.address} refuses: {words}")
        case grpc.StatusCode.UNAVAILABLE:
            return _unreachable(source, words)
        case _:
            return Broken(words or code.name)


def clean(text: str) -> str:
    """A server's words on one line of plain characters: they are shown on a terminal."""
    return "".join(c if c.isascii() and c.isprintable() else " " for c in text)[:MAX_WORDS].strip()


def _unreachable(source: Source, words: str) -> Broken | UserError:
    """Why no connection comes about, found by a handshake of our own: gRPC's words for it are not made for people."""
    host, port = source.host_and_port()
    context = ssl.create_default_context(cafile=str(source.ca))
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return Broken(words or "the connection broke")
    except ssl.SSLCertVerificationError as error:
        return UserError(
            f"{source.address} is not the study's server ({error.verify_message}): compare {source.ca} "
            "with the coordinator's by telephone; nothing was sent"
        )
    except ssl.SSLError:
        return Broken("it speaks no TLS: is the port right?")
    except OSError as error:
        return Broken(f"it is not reached ({error.strerror or error})")


def _read_token(path: Path) -> str:
    """The token.

    Raises:
        UserError: The file cannot be read, others can read it too, or it holds no token.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise UserError(f"{path} can be read by others: correct it with 'chmod 600 {path}'")
        token = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected the token that 'fedcmr-server token' made") from None
    except (OSError, UnicodeDecodeError):
        token = ""
    if not TOKEN.fullmatch(token):
        raise UserError(f"{path} holds no token: expected the one that 'fedcmr-server token' made for this site")
    return token
