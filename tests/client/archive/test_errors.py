"""What goes wrong between a site and its archive: one line each, with the remedy, and no secret in it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedcmr.client.cli import main
from fedcmr.shared.free_ports import free_ports
from fedcmr.simulations.benchmarks.orthanc import Orthanc
from tests.client.archive.gateways import make_certificate, private, relay
from tests.client.archive.studies import write_study

QUERY = ("--query", "date=2020..2021")
LOGIN = ("doctor", "s3cret-of-the-test")
real = [pytest.mark.engine, pytest.mark.tool("Orthanc"), pytest.mark.tool("libOrthancDicomWeb.so")]


def refused(capfd, *command: object) -> str:
    """The one line that a command ends with."""
    assert main(["import", *map(str, command)]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and LOGIN[1] not in line
    return line


@pytest.fixture(scope="module")
def secured(tmp_path_factory) -> Iterator[tuple[str, Orthanc, Path]]:
    """The address of an archive behind TLS, with a password for DICOMweb and certificates on both sides for DIMSE."""
    folder = tmp_path_factory.mktemp("secured")
    authority = make_certificate(folder, "ca")
    for name in ("server", "site"):
        make_certificate(folder, name, authority)
    make_certificate(folder, "other")
    settings = {
        "RegisteredUsers": dict([LOGIN]),
        "DicomTlsEnabled": True,
        "DicomTlsCertificate": str(folder / "server.crt"),
        "DicomTlsPrivateKey": str(folder / "server.key"),
        "DicomTlsTrustedCertificates": str(folder / "ca.crt"),
    }
    with Orthanc(folder / "orthanc", **settings) as orthanc:
        orthanc.store(sorted(write_study(folder / "scans", 0).glob("*.dcm")))
        port, end = relay(folder / "server.crt", folder / "server.key", orthanc.http_port)
        yield f"https://127.0.0.1:{port}/dicom-web", orthanc, folder
        end()


class TestSecured:
    pytestmark = real

    def test_an_archive_behind_tls_and_a_password_is_read(self, secured, tmp_path, capfd, monkeypatch):
        url, _, folder = secured
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "other.crt"))  # --ca goes before it
        web = ["--dicomweb", url, *QUERY, "--ca", folder / "ca.crt"]
        login = private(tmp_path / "login", ":".join(LOGIN))
        assert main(["import", *map(str, [tmp_path / "train", *web, "--login-file", login])]) == 0
        assert "studies fetched: 1," in capfd.readouterr().out
        assert "HTTP 401" in refused(capfd, tmp_path / "x", *web) and not (tmp_path / "x").exists()
        token = private(tmp_path / "token", "s3cret-of-the-test")
        assert "HTTP 401" in refused(capfd, tmp_path / "x", *web, "--token-file", token)
        untrusted = [*web[:-1], folder / "other.crt"]
        assert "is not trusted" in refused(capfd, tmp_path / "x", *untrusted, "--login-file", login)
        plain = ["--dicomweb", url.replace("https", "http"), *QUERY]
        assert "error" in refused(capfd, tmp_path / "x", *plain)

    def test_dimse_over_tls(self, secured, tmp_path, capfd):
        _, archive, folder = secured
        own = ["--client-cert", folder / "site.crt", "--client-key", folder / "site.key"]
        dimse = ["--dimse", archive.dimse, *QUERY]
        trusting = ["--ca", folder / "ca.crt"]
        assert main(["import", *map(str, [tmp_path / "train", *dimse, *trusting, *own])]) == 0
        assert "studies fetched: 1," in capfd.readouterr().out
        line = refused(capfd, tmp_path / "x", *dimse, "--ca", folder / "other.crt", *own)
        assert "is not trusted" in line and "--ca" in line
        assert "--client-cert" in refused(capfd, tmp_path / "x", *dimse, *trusting)
        assert "expect TLS" in refused(capfd, tmp_path / "x", *dimse)
        line = refused(capfd, tmp_path / "x", *dimse, *trusting, "--own-aet", "FEDCMR:11112")
        assert "--client-cert" in line


class TestPlain:
    pytestmark = real

    def test_names_that_the_other_side_does_not_know(self, archive, tmp_path, capfd):
        wrong = archive.dimse.replace("ORTHANC", "WRONG")
        assert "is not WRONG" in refused(capfd, tmp_path / "x", "--dimse", wrong, *QUERY)
        line = refused(capfd, tmp_path / "x", "--dimse", archive.dimse, "--own-aet", "NOBODY", *QUERY)
        assert "NOBODY" in line and "--own-aet" in line
        with_port = ["--own-aet", f"FEDCMR:{free_ports(1)[0]}"]
        line = refused(capfd, tmp_path / "x", "--dimse", archive.dimse, *with_port, *QUERY)
        assert "does not connect to FEDCMR" in line

    def test_a_server_without_a_search(self, archive, tmp_path, capfd):
        line = refused(capfd, tmp_path / "x", "--dicomweb", f"{archive.root}/nothing", *QUERY)
        assert "QIDO-RS; HTTP 404" in line and "--dimse" in line


def test_nobody_is_there(tmp_path, capfd):
    (port,) = free_ports(1)
    for where in (("--dicomweb", f"http://127.0.0.1:{port}/dicom-web"), ("--dimse", f"PACS@127.0.0.1:{port}")):
        line = refused(capfd, tmp_path / "x", *where, *QUERY)
        assert "is not reached" in line and "refused" in line.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gate() -> Iterator[tuple[str, list[str]]]:
    """A server that answers every search with nothing, to whoever shows the token; and what it was shown."""
    shown: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization", ""))
            self.send_response(200 if shown[-1] == "Bearer abc.def" else 403)
            self.send_header("Content-Type", "application/dicom+json")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/web", shown
    server.shutdown()


def test_a_token_goes_before_a_netrc(gate, tmp_path, capfd, monkeypatch):
    url, shown = gate
    monkeypatch.setenv("NETRC", str(private(tmp_path / "netrc", f"machine 127.0.0.1 login a password {LOGIN[1]}")))
    token = private(tmp_path / "token", "abc.def\n")
    line = refused(capfd, tmp_path / "x", "--dicomweb", url, "--token-file", token, "--query", "date=2020-01")
    assert "no study for this query" in line and set(shown) == {"Bearer abc.def"}
    assert "HTTP 403" in refused(capfd, tmp_path / "x", "--dicomweb", url, "--query", "date=2020-01")
    assert shown[-1].startswith("Basic ")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--token-file", "{open}"], "chmod 600"),
        (["--token-file", "{missing}"], "No such file"),
        (["--client-cert", "{secret}"], "belong together"),
        (["--ca", "{secret}"], "--ca"),
        (["--login-file", "{secret}"], "USER:PASSWORD"),
        (["--own-aet", "X"], "means nothing"),
        (["--timeout", "0"], "--timeout"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_asked(tmp_path, capfd, more, told):
    files = {"secret": private(tmp_path / "secret", LOGIN[1]), "open": private(tmp_path / "open", LOGIN[1])}
    files["open"].chmod(0o644)
    files["missing"] = tmp_path / "missing"
    command = [str(one).format(**files) for one in more]
    line = refused(capfd, tmp_path / "x", "--dicomweb", "https://127.0.0.1:9/x", *QUERY, *command)
    assert told in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "where",
    [
        ("--dimse", "PACS"),
        ("--dimse", "PACS@host"),
        ("--dimse", "NAME-THAT-IS-TOO-LONG@host:104"),
        ("--dicomweb", "ftp://host/x"),
        ("--dicomweb", f"https://{LOGIN[0]}:{LOGIN[1]}@host/x"),
    ],
)
def test_an_address_that_is_none(tmp_path, capfd, where):
    assert "expected" in refused(capfd, tmp_path / "x", *where, *QUERY)


def test_a_secret_does_not_travel_in_clear(tmp_path, capfd):
    token = private(tmp_path / "token", LOGIN[1])
    line = refused(capfd, tmp_path / "x", "--dicomweb", "http://10.0.0.1/x", *QUERY, "--token-file", token)
    assert "https://" in line
