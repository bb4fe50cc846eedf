"""A gateway that asks for the site's certificate, and a proxy that the environment names: both really there."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedcmr.client.cli import main
from fedcmr.shared.free_ports import free_ports
from tests.client.archive.gateways import Proxy, make_certificate, relay
from tests.client.archive.studies import study_uid

PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


class NothingThere(BaseHTTPRequestHandler):
    """Answers every search with nothing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = make_certificate(folder, "ca")
    for name in ("server", "site"):
        make_certificate(folder, name, authority)
    make_certificate(folder, "stranger", make_certificate(folder, "other"))
    return folder


@pytest.fixture(scope="module")
def gate(certificates) -> Iterator[str]:
    """The address of a gateway that asks for a certificate, with an archive behind it that holds nothing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), NothingThere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = (certificates / "server.crt", certificates / "server.key")
    port, end = relay(*files, server.server_port, certificates / "ca.crt")
    yield f"https://127.0.0.1:{port}/web"
    end()
    server.shutdown()


@pytest.fixture
def proxy(monkeypatch) -> Iterator[Proxy]:
    """A proxy that the environment does not name yet."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    one = Proxy()
    yield one
    one.end()


@pytest.fixture(params=["alert", "HTTP 400"])
def outspoken(request, certificates) -> Iterator[str]:
    """The address of a gateway that says why it lets nobody in: in TLS, or as nginx does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED if request.param == "alert" else ssl.CERT_NONE
    page = b"<h1>400 Bad Request</h1>No required SSL certificate was sent"
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listening.accept()
                plain.settimeout(10.0)
                with plain, contextlib.suppress(OSError):
                    try:
                        with context.wrap_socket(plain.dup(), server_side=True) as secure:
                            secure.recv(65_536)
                            secure.sendall(answer)
                    except ssl.SSLError:
                        plain.shutdown(socket.SHUT_WR)
                        plain.recv(65_536)  # what lies unread when a socket is closed takes the alert along

    threading.Thread(target=serve, daemon=True).start()
    yield f"https://127.0.0.1:{listening.getsockname()[1]}/web"
    listening.close()


@pytest.fixture
def site(certificates, gate, tmp_path, capfd, caplog) -> SimpleNamespace:
    """Runs `import`, and gives its exit code and last line."""

    def run(*more: object, url: str = gate, ca: str = "ca", own: str | None = "site") -> tuple[int, str]:
        command = ["import", tmp_path / "train", "--dicomweb", url, "--query", "date=2020-01", *more]
        command += ["--ca", certificates / f"{ca}.crt"]
        if own is not None:
            command += ["--client-cert", certificates / f"{own}.crt", "--client-key", certificates / f"{own}.key"]
        code = main(list(map(str, command)))
        told = capfd.readouterr()
        assert caplog.records == [] and not (tmp_path / "train").exists()
        if code == 0:
            return code, told.out.strip().splitlines()[-1]
        (line,) = told.err.strip().splitlines()
        return code, line

    return SimpleNamespace(run=run, folder=tmp_path)


def test_the_sites_certificate_opens_the_gate_and_no_other_does(site, proxy):
    assert site.run("--dry-run") == (
        0,
        "0 of the studies above were fetched before; a dry run fetches and writes nothing",
    )
    for own in (None, "stranger"):
        code, line = site.run(own=own)
        assert code == 2 and "--client-cert" in line and "certificate of this site" in line
    code, line = site.run(ca="other")
    assert code == 2 and "is not trusted" in line and "--ca" in line


def test_a_gateway_that_says_what_it_wants_is_understood(site, proxy, outspoken):
    code, line = site.run(url=outspoken, own="stranger")
    assert code == 2 and "asks for a certificate of this site" in line and "--client-cert" in line


def test_a_proxy_of_the_environment_is_used_and_left_out_where_the_environment_says_so(site, proxy, gate, monkeypatch):
    host = gate.split("/")[2]
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.address}")
    assert site.run("--dry-run")[0] == 0
    assert set(proxy.asked) == {host}
    num_asked = len(proxy.asked)
    code, line = site.run(own="stranger")
    assert code == 2 and "--client-cert" in line, "the gateway is heard through the proxy"
    code, line = site.run(ca="other")
    assert code == 2 and "is not trusted" in line
    assert len(proxy.asked) > num_asked
    num_asked = len(proxy.asked)
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    assert site.run("--dry-run")[0] == 0
    assert len(proxy.asked) == num_asked


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("403 Forbidden", "refuses"),
        ("407 Proxy Authentication Required", "USER:PASSWORD@"),
        ("502 Bad Gateway", "HTTP 502"),
        (None, "does not answer"),
    ],
)
def test_what_a_proxy_refuses_is_told_as_the_proxys_and_without_its_password(site, proxy, monkeypatch, status, said):
    address = f"127.0.0.1:{free_ports(1)[0]}" if status is None else proxy.address
    proxy.status = status
    monkeypatch.setenv("HTTPS_PROXY", "http://user:{}@{}".format("s3cret", address))  # apart, for who looks for secrets
    code, line = site.run()
    assert code == 2 and line.startswith("error: ") and f"the proxy {address}" in line and said in line, line
    assert "HTTPS_PROXY" in line and "NO_PROXY" in line and "s3cret" not in line


def test_a_secret_for_this_machine_goes_past_the_proxy(site, proxy, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("abc")
    token.chmod(0o600)
    server = ThreadingHTTPServer(("127.0.0.1", 0), NothingThere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.address}")
    url = f"http://127.0.0.1:{server.server_port}/web"
    assert site.run("--dry-run", "--token-file", token, url=url)[0] == 0
    assert proxy.asked == []
    server.shutdown()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.tool("Orthanc")
@pytest.mark.tool("libOrthancDicomWeb.so")
def test_a_study_comes_through_proxy_and_gateway(
    archive, from_files, key_file, certificates, proxy, tmp_path, monkeypatch
):
    files = (certificates / "server.crt", certificates / "server.key")
    port, end = relay(*files, archive.http_port, certificates / "ca.crt")
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    listed = tmp_path / "list.txt"
    listed.write_text(study_uid(0))
    command = ["import", tmp_path / "train", "--dicomweb", f"https://127.0.0.1:{port}/dicom-web"]
    command += ["--query", f"list={listed}", "--key", key_file, "--ca", certificates / "ca.crt"]
    command += ["--client-cert", certificates / "site.crt", "--client-key", certificates / "site.key"]
    assert main(list(map(str, command))) == 0
    end()
    assert set(proxy.asked) == {f"127.0.0.1:{port}"}
    (case,) = (tmp_path / "train" / "cases").glob("*.npz")
    assert case.read_bytes() == (from_files / "cases" / case.name).read_bytes()
