"""What stands between a site and its archive: a gateway with TLS, a proxy, and the certificates of both sides."""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def make_certificate(folder: Path, name: str, issuer: tuple | None = None) -> tuple:
    """Write `name`.crt and `name`.key; returns certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private(folder / f"{name}.key", pem.decode())
    return certificate, key


def relay(certificate: Path, key: Path, target_port: int, ca: Path | None = None) -> tuple[int, Callable[[], None]]:
    """TLS in front of a plain port, as a gateway has it (Debian's Orthanc crashes over HTTPS of its own).

    Args:
        certificate: Of the gateway, with its key.
        key: Likewise.
        target_port: On this machine.
        ca: Of those who may come in; None for everybody.

    Returns:
        Its port, and what ends it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if ca is not None:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _join(reader, writer, target_port)

    return _serve(serve, context)


class Proxy:
    """A proxy for HTTPS (CONNECT, RFC 9110, 9.3.6), on loopback.

    Attributes:
        asked: What it was asked to connect to, HOST:PORT.
        status: Of its answers; 200 lets through.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = "200 Connection established"
        port, self.end = _serve(self._serve, None)
        self.address = f"127.0.0.1:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, target, _ = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
        self.asked.append(target.decode())
        assert method == b"CONNECT"
        writer.write(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
        if self.status.startswith("200"):
            await _join(reader, writer, int(target.rpartition(b":")[2]))
        writer.close()


def _serve(serve: Callable, context: ssl.SSLContext | None) -> tuple[int, Callable[[], None]]:
    """Answer connections in a thread; returns the port, and what ends it."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return server.sockets[0].getsockname()[1], lambda: loop.call_soon_threadsafe(loop.stop)


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target_port: int) -> None:
    """Pass everything on, both ways."""
    inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target_port)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))
