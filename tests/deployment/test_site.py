"""What a site looks at before it joins: each thing that is wrong is named, with its remedy."""

import json
import select
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedcmr.client.cli import main
from fedcmr.client.code_hash import code_sha256
from fedcmr.client.deployment.connection import examine
from fedcmr.client.deployment.supernode import _environment
from fedcmr.client.ledger import Ledger, dataset_of
from fedcmr.client.policy import SitePolicy, load_site
from fedcmr.server.deployment import authority
from fedcmr.shared.case import fingerprint, load_cases
from fedcmr.shared.models.prior import save_prior
from fedcmr.shared.privacy import Release
from tests.deployment.conftest import change_site, free_port, server

UNRESOLVED = "study.hospital.invalid"


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c") / "coordinator"
    assert server("init", folder, "--name", "study", "--address", "127.0.0.1", UNRESOLVED) == 0
    return folder


class Clock(BaseHTTPRequestHandler):
    """Tells a time that is `skew_s` ahead."""

    skew_s = 0.0

    def do_HEAD(self):
        self.send_response_only(404)
        self.send_header("Date", format_datetime(datetime.now(UTC) + timedelta(seconds=self.skew_s), usegmt=True))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(coordinator):
    """`serve(certificate_of, skew_s)`: a TLS server (plain where None); returns its port."""
    servers = []

    def start(certificate_of=coordinator, skew_s=0.0):
        handler = type("Skewed", (Clock,), {"skew_s": skew_s})
        running = HTTPServer(("127.0.0.1", 0), handler)
        if certificate_of is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate_of / "server.crt", certificate_of / "server.key")
            running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        servers.append(running)
        return running.server_address[1]

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


@pytest.fixture
def site(tmp_path, coordinator, write_cases):
    """A site's folder as the command makes it, with six cases."""
    folder = tmp_path / "site"
    assert (
        main(
            [
                "init",
                str(folder),
                "--name",
                "a",
                "--vendor",
                "GE",
                "--nominal-patients",
                "6",
                "--coordinator",
                "127.0.0.1:1",
                "--authority",
                str(coordinator / "ca.crt"),
                "--ledger-same-disk",
            ]
        )
        == 0
    )
    write_cases(folder / "train", "GE", 6, seed=1)
    return folder


def troubles(site):
    return {found.name: found.text for found in examine(load_site(site)) if not found.ok}


def test_init_makes_a_key_and_allows_the_installed_code_alone(site):
    assert stat.S_IMODE((site / "node_key").stat().st_mode) == 0o600
    public = load_ssh_public_key((site / "node_key.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey) and public.curve.key_size == 384
    settings = load_site(site)
    assert settings.policy.allowed_code_sha256 == [code_sha256()]
    assert settings.authority_path == site / "ca.crt"
    before = (site / "node_key").read_bytes()
    assert main(["key", str(site)]) == 0
    assert (site / "node_key").read_bytes() == before, "the coordinator has registered it"


def test_a_site_in_order_has_no_troubles(site, serve, capsys):
    change_site(site, coordinator=f"127.0.0.1:{serve()}")
    assert troubles(site) == {}
    assert main(["check", str(site)]) == 0
    assert "of the study's authority" in capsys.readouterr().out


class Tunnel(BaseHTTPRequestHandler):
    """A hospital's proxy: passes TLS on, to whatever name, to the one server that it knows."""

    upstream = 0
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_CONNECT(self):
        self.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        with socket.create_connection(("127.0.0.1", self.upstream)) as there:
            self.send_response_only(200)
            self.end_headers()
            sides = {self.connection: there, there: self.connection}
            while True:
                for side in select.select(list(sides), [], [], 10)[0]:
                    data = side.recv(65536)
                    if not data:
                        self.close_connection = True
                        return
                    sides[side].sendall(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def proxy(serve):
    """A proxy before a server of the study; its port, and what it was asked for."""
    handler = type("Known", (Tunnel,), {"upstream": serve(), "asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running.server_address[1], handler.asked
    running.shutdown()
    running.server_close()


def test_the_way_through_a_proxy_is_the_one_that_is_looked_at(site, proxy, monkeypatch):
    port, asked = proxy
    change_site(site, coordinator=f"{UNRESOLVED}:443")  # only the proxy knows the way
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", f"http://{'user:p%40ss'}@127.0.0.1:{port}")
    assert troubles(site) == {}
    assert set(asked) == {(f"{UNRESOLVED}:443", "Basic dXNlcjpwQHNz")} and len(asked) == 3
    texts = {found.name: found.text for found in examine(load_site(site))}
    assert texts["coordinator"] == f"{UNRESOLVED}:443 is reached through the proxy 127.0.0.1:{port}"
    monkeypatch.setenv("no_proxy", UNRESOLVED)
    assert "is not reached" in troubles(site)["coordinator"], "what is asked directly is looked at directly"


def test_a_site_whose_patients_have_taught_the_prior_cannot_join(site, prior, tmp_path):
    """Whoever the public prior has learnt from is public: no study with it can protect them."""
    cases = load_cases(load_site(site).data_path)
    scale = (prior.style_mean, prior.style_std, prior.style_correlation)
    for name, seen in (("others", ["0" * 64]), ("own", [fingerprint(case) for case in cases[:2]])):
        save_prior(tmp_path / f"{name}.safetensors", prior.generator, *scale, {"has_seen": json.dumps(seen)})
    change_site(site, prior=str(tmp_path / "others.safetensors"))
    texts = {found.name: found.text for found in examine(load_site(site))}
    assert "prior" not in troubles(site) and "from 1 public patients, and from none of the site's" in texts["prior"]
    change_site(site, prior=str(tmp_path / "own.safetensors"))
    assert "has learnt from 2 patients" in troubles(site)["prior"]


@pytest.mark.parametrize("value", ["https://proxy.example:3128", "proxy.example", "socks5://proxy.example:1080"])
def test_a_proxy_that_cannot_be_used_is_named(site, monkeypatch, value):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("https_proxy", value)
    change_site(site, coordinator=f"{UNRESOLVED}:443")
    assert "https_proxy: expected http://HOST:PORT" in troubles(site)["coordinator"]


def test_a_site_asks_its_own_machine_without_the_proxy(site, serve, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    change_site(site, coordinator=f"127.0.0.1:{serve()}")
    assert troubles(site) == {}
    monkeypatch.setenv("no_proxy", "pacs.hospital.example")
    assert _environment(load_site(site))["no_proxy"] == "pacs.hospital.example,127.0.0.1,localhost"


def test_a_server_that_is_not_there_is_told_from_one_that_is_another(site, serve, tmp_path):
    change_site(site, coordinator=f"127.0.0.1:{free_port()}")
    assert "is not reached" in troubles(site)["coordinator"]
    assert server("init", tmp_path / "other", "--name", "study", "--address", "127.0.0.1") == 0
    change_site(site, coordinator=f"127.0.0.1:{serve(tmp_path / 'other')}")
    found = troubles(site)
    assert "coordinator" not in found and "is not the study's server" in found["certificate"]
    change_site(site, coordinator=f"127.0.0.1:{serve(None)}")
    assert "speaks no TLS" in troubles(site)["certificate"]


@pytest.mark.parametrize(("days", "told"), [(0, "has expired: ask"), (20, "for 19 more days: ask")])
def test_a_certificate_that_ends_is_no_stranger(site, serve, coordinator, tmp_path, monkeypatch, days, told):
    folder = shutil.copytree(coordinator, tmp_path / "c")
    monkeypatch.setattr(authority, "SERVER_DAYS", days)
    authority.issue_server_certificate(folder, ["127.0.0.1"])
    time.sleep(1.1)  # a certificate's end is a whole second
    change_site(site, coordinator=f"127.0.0.1:{serve(folder)}")
    texts = {found.name: found.text for found in examine(load_site(site))}
    assert told in texts["certificate"] and ("certificate" in troubles(site)) == (days == 0)


@pytest.mark.parametrize(("skew_s", "told"), [(300, "-300 s"), (-20, "+20 s")])
def test_a_clock_that_is_off_is_named(site, serve, skew_s, told):
    change_site(site, coordinator=f"127.0.0.1:{serve(skew_s=skew_s)}")
    found = troubles(site)
    assert list(found) == ["clock"]
    seen = found["clock"].replace("-299", "-300").replace("+21", "+20")
    assert told in seen


@pytest.mark.parametrize("skew_s", [100, -2])
def test_a_clock_that_flower_takes_is_no_trouble(site, serve, skew_s):
    change_site(site, coordinator=f"127.0.0.1:{serve(skew_s=skew_s)}")
    assert troubles(site) == {}


def test_a_key_that_others_can_read_any_code_and_few_patients_are_named(site, serve):
    change_site(
        site,
        coordinator=f"127.0.0.1:{serve()}",
        vendors={"GE": 9},
        nominal_patients=9,
        policy=SitePolicy(min_patients=8),
    )
    (site / "node_key").chmod(0o644)
    found = troubles(site)
    assert set(found) == {"key", "code", "cases"}
    assert "chmod 600" in found["key"] and "fedcmr-client code" in found["code"] and "min_patients, 8" in found["cases"]
    (site / "node_key").unlink()
    assert "is missing" in troubles(site)["key"]


def test_a_site_that_is_not_in_order_does_not_join(site, capsys):
    assert main(["join", str(site), "--wait", "0"]) == 2
    error = capsys.readouterr().err
    assert "cannot join" in error and "is not reached" in error and "Traceback" not in error
    assert main(["check", str(site)]) == 2
    assert "to be put right" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"coordinator": None}, {"coordinator": "host"}, {"authority": None}])
def test_settings_that_lack_the_way_to_the_coordinator_are_named(site, serve, changes):
    change_site(site, **({"coordinator": f"127.0.0.1:{serve()}"} | changes))
    assert any("site.yaml" in text for text in troubles(site).values())


def test_a_site_of_an_earlier_version_still_loads(tmp_path):
    (tmp_path / "site.yaml").write_text("name: a\nvendor: GE\nnominal_patients: 9\n")
    assert load_site(tmp_path).coordinator is None


def test_half_of_a_deployment_is_refused(tmp_path, capsys):
    arguments = ["init", str(tmp_path / "s"), "--name", "a", "--vendor", "GE", "--nominal-patients", "6"]
    assert main([*arguments, "--coordinator", "x:1"]) == 2
    assert "belong together" in capsys.readouterr().err
    (tmp_path / "ca.crt").write_text("no certificate")
    assert main([*arguments, "--coordinator", "x:1", "--authority", str(tmp_path / "ca.crt")]) == 2
    assert "holds no certificate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [".", "site.yaml", "train", "train/cases", "train/cases.csv", "ledger", "ledger.replica"]
)
def test_what_other_accounts_may_use_is_named_with_its_remedy(site, serve, name):
    change_site(site, coordinator=f"127.0.0.1:{serve()}")
    (site / "ledger").mkdir(mode=0o700)
    (site / "ledger.replica").touch(mode=0o600)
    path = site / name
    path.chmod(0o750 if path.is_dir() else 0o640)
    found = troubles(site)
    assert list(found) == ["permissions"] and "chmod -R go= " in found["permissions"]
    subprocess.run(shlex.split(found["permissions"].split("'")[1]), check=True)
    assert troubles(site) == {}


@pytest.fixture
def other_disk():
    """A folder on another file system than the tests'."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_a_ledger_that_could_be_taken_back_as_a_whole_does_not_join(site, serve, tmp_path, other_disk):
    """A backup of the disk, or of the site's folder, once took both copies back and nothing noticed."""
    change_site(site, coordinator=f"127.0.0.1:{serve()}", ledger_same_disk=False)
    assert list(troubles(site)) == ["ledger"] and "own folder" in troubles(site)["ledger"], (
        "next to the ledger, as before"
    )
    change_site(site, ledger_replica="copy.jsonl")
    assert "own folder" in troubles(site)["ledger"]
    change_site(site, ledger_replica="../copy.jsonl")
    assert "one file system" in troubles(site)["ledger"] and "ledger_same_disk: true" in troubles(site)["ledger"]
    assert main(["join", str(site)]) == 2
    (site / "disk").symlink_to(other_disk)
    change_site(site, ledger_replica="disk/copy.jsonl")
    assert troubles(site) == {}, "a link to another disk is another disk"
    change_site(site, ledger_replica=str(other_disk / "copy.jsonl"))
    assert troubles(site) == {}
    (other_disk / "link.jsonl").symlink_to(tmp_path / "copy.jsonl")
    change_site(site, ledger_replica=str(other_disk / "link.jsonl"))
    assert "one file system" in troubles(site)["ledger"], "a link on another disk is no copy there"
    change_site(site, ledger_replica=str(other_disk / "none" / "copy.jsonl"))
    assert "mount" in troubles(site)["ledger"]
    change_site(site, ledger_replica=None, ledger_same_disk=True)
    texts = {found.name: found.text for found in examine(load_site(site))}
    assert troubles(site) == {} and "forgets" in texts["ledger"], "what was chosen is said every time"


def test_the_ledger_of_the_test_patients_may_not_lie_next_to_its_own_second_copy(site, serve, other_disk):
    change_site(
        site,
        coordinator=f"127.0.0.1:{serve()}",
        ledger_same_disk=False,
        test="test",
        ledger_replica=str(other_disk / "copy.jsonl"),
    )
    shutil.copytree(site / "train", site / "test")
    assert troubles(site) == {}
    change_site(site, test_ledger=str(other_disk / "test_ledger"))
    assert "one file system" in troubles(site)["ledger"] and "test_ledger" in troubles(site)["ledger"]


@pytest.mark.parametrize("moved", ["ledger", "ledger.replica"])
def test_a_ledger_that_was_moved_aside_is_noticed(site, serve, moved):
    """A second ledger over the same patients starts at nothing spent."""
    change_site(site, coordinator=f"127.0.0.1:{serve()}")
    assert troubles(site) == {}
    ledger = Ledger(site / "ledger", dataset=dataset_of(site / "train"))
    ledger.reserve("run", 1, Release(4.0, 1.0, 1), 1e-3, 8)
    assert troubles(site) == {}
    (site / "ledger").rename(site / "old")
    (site / "ledger.replica").rename(site / "old.replica")
    shutil.rmtree(site / "old") if moved == "ledger.replica" else (site / "old.replica").unlink()
    assert "old" in troubles(site)["ledger"] and "is spent" in troubles(site)["ledger"]


def test_the_ledger_of_other_patients_is_no_trouble(site, serve):
    change_site(site, coordinator=f"127.0.0.1:{serve()}")
    Ledger(site / "earlier", dataset="of another key").reserve("run", 1, Release(4.0, 1.0, 1), 1e-3, 8)
    own = dataset_of(site / "train")  # test patients are prepared with the same key, and have a ledger of their own
    Ledger(site / "test_ledger", dataset=own).reserve("run", 1, Release(4.0, 1.0, 1), 1e-3, 8)
    assert troubles(site) == {}
