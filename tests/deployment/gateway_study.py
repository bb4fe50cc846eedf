"""A small study behind a real nginx: certificates, SuperLink, one SuperNode, and an app of one round."""

import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

BIN = Path(sys.executable).parent
PROTOBUF = "application/protobuf"
APP = """
import time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
{body}
"""
SERVER = """
import numpy as np
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.arange(4000, dtype=np.float32))})})
    question = Message(content=content, message_type="train", dst_node_id=nodes[0])
    (reply,) = grid.send_and_receive([question], timeout=60)
    assert not reply.has_error(), reply.error
    print("SUM", float(reply.content["arrays"]["x"].numpy().sum()), flush=True)
"""
CLIENT = """
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    doubled = message.content["arrays"]["x"].numpy() * 2
    return Message(content=RecordDict({"arrays": ArrayRecord({"x": Array(doubled)})}), reply_to=message)
"""
PROJECT = """
[project]
name = "one-round"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "one_round.server_app:app"
clientapp = "one_round.client_app:app"
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    path.touch(0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def write_certificates(folder: Path, names: list[str]) -> None:
    """`ca.crt`, `server.crt` and `server.key` of a study, valid for an hour."""
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    subjects = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in ("test ca", "test server")]
    for index, file in enumerate(("ca.crt", "server.crt")):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subjects[index])
            .issuer_name(subjects[0])
            .public_key(keys[index].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=index == 0, path_length=None), critical=True)
        )
        if file == "server.crt":
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), False)
        certificate = builder.sign(keys[0], hashes.SHA256())
        (folder / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_key(folder / "server.key", keys[1], serialization.PrivateFormat.PKCS8)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def write_node_key(path: Path) -> bytes:
    """A SuperNode's private key; its public half as the SuperLink keeps it."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_key(path, key, serialization.PrivateFormat.OpenSSH)
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_app(folder: Path) -> Path:
    """An app of one question and one answer, to move every kind of object through the gateway."""
    package = folder / "one_round"
    package.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (package / "__init__.py").touch()
    (package / "server_app.py").write_text(APP.format(body=SERVER))
    (package / "client_app.py").write_text(APP.format(body=CLIENT))
    return folder


@contextmanager
def process(log: Path, *command: str | Path, home: Path, commands: Path = BIN):
    """A program in a session of its own, ended with all its children; it finds others in `commands` first."""
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(commands), str(BIN), os.environ["PATH"]]),
    }
    with log.open("w") as file:
        started = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=log.parent,
        )
    try:
        yield started
    finally:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(timeout=10)
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for(condition: Callable[[], bool], what: str, *logs: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} in {seconds} s\n" + "\n".join(log.read_text()[-3000:] for log in logs))
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def connect(port: int, authority: Path | None, name: str | None = "localhost") -> socket.socket:
    """A connection, over TLS unless `authority` is None; a name of None asks for none."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    if authority is None:
        return plain
    context = ssl.create_default_context(cafile=authority)
    context.check_hostname = name is not None
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except OSError:
        plain.close()
        raise


def send(port: int, request: bytes, authority: Path | None, name: str | None = "localhost") -> tuple[int, str]:
    """Bytes as they are over one connection.

    Args:
        authority: The certificate to trust; None for plain text.
        name: Asked for in TLS; None asks for no name.

    Returns:
        The status (0 where the connection was closed without one), and the answer's header lines and body.
    """
    with connect(port, authority, name) as connection:
        answer = b""
        with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            connection.sendall(request)  # may be refused before all of a body was sent; why is said all the same
        with suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := connection.recv(65536):
                answer += part
    text = answer.decode("latin-1")
    return (int(text.split(" ", 2)[1]) if text.startswith("HTTP/") else 0), text


def request(method: str, target: str, body: bytes = b"", host: str = "localhost", *headers: str) -> bytes:
    """One HTTP/1.1 request, its target as given."""
    lines = [
        f"{method} {target} HTTP/1.1",
        f"Host: {host}",
        f"Content-Length: {len(body)}",
        f"Content-Type: {PROTOBUF}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
