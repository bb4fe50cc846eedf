"""A real nginx before a real SuperLink: what a site needs passes, nothing else does."""

import json
import shutil
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto import control_pb2
from flwr.supercore.fab import Fab
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcmr.client.fetch.fetch import Query, fetch
from fedcmr.client.fetch.source import Source
from fedcmr.server.delivery.released_set import open_released_set
from fedcmr.server.delivery.serve import Service
from fedcmr.server.delivery.service import Offer
from fedcmr.server.delivery.tokens import issue_token
from fedcmr.server.deployment.authority import write_secret
from fedcmr.server.deployment.gateway import FLEET_PATHS, Limits, write_gateway
from fedcmr.shared.case import read_index
from fedcmr.shared.delivery.delivery_pb2 import DescribeRequest
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryStub
from fedcmr.shared.errors import UserError
from tests.deployment.gateway_study import (
    BIN,
    connect,
    free_ports,
    listens,
    process,
    request,
    send,
    wait_for,
    write_app,
    write_certificates,
    write_node_key,
)
from tests.server.delivery.conftest import finished_run
from tests.tools import find

NGINX = find("nginx")
pytestmark = [pytest.mark.engine, pytest.mark.tool("nginx")]
LIMITS = Limits(connections=8)
LISTED = FLEET_PATHS[3]

# Request lines that must not pass: the Control API, everything else that the SuperLink serves, and every way to write
# one path as another.
REFUSED = [
    ("POST", "/v1/control/list-runs"),
    ("POST", "/v1/control/start-run"),
    ("POST", "/v1/control/register-node"),
    ("POST", "/v1/runtime/acquire-task"),
    ("POST", "/v1/fleet/register-node"),
    ("POST", "/v1/fleet/unregister-node"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/health"),
    ("GET", "/"),
    ("POST", "/v1/fleet/../control/list-runs"),
    ("POST", "/v1/fleet/%2e%2e/control/list-runs"),
    ("POST", "/v1/fleet/%2E./control/list-runs"),
    ("POST", "/v1/fleet/..%2fcontrol/list-runs"),
    ("POST", f"{LISTED}/../../control/list-runs"),
    ("POST", f"/v1/control/list-runs/../../..{LISTED}"),
    ("POST", f"/%76{LISTED[2:]}"),
    ("POST", LISTED.replace("/fleet/", "%2ffleet/")),
    ("POST", f"/{LISTED}"),
    ("POST", LISTED.replace("/fleet", "//fleet")),
    ("POST", LISTED.replace("/fleet", "/./fleet")),
    ("POST", f"{LISTED}/"),
    ("POST", f"{LISTED}?"),
    ("POST", f"{LISTED}?x=/v1/control/list-runs"),
    ("POST", f"/v1/control/list-runs?{LISTED}"),
    ("POST", f"{LISTED};x"),
    ("POST", LISTED.upper()),
    ("POST", "/v1/fleet/..\\control/list-runs"),
    ("GET", LISTED),
    ("HEAD", LISTED),
    ("PUT", LISTED),
    ("DELETE", LISTED),
    ("OPTIONS", LISTED),
]


@dataclass
class Deployment:
    folder: Path
    gateway: int
    superlink: int
    delivery: int

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    def passed(self) -> list[dict[str, object]]:
        """What the gateway has logged so far."""
        return [json.loads(line) for line in (self.folder / "gateway" / "access.log").read_text().splitlines()]

    def ask(self, content: bytes, **options) -> tuple[int, str, str]:
        """Status and text of the gateway's answer, and to whom it has passed the request, if to anybody."""
        before = len(self.passed())
        status, text = send(self.gateway, content, options.pop("authority", self.authority), **options)
        wait_for(lambda: len(self.passed()) > before, "line in the log", seconds=15)
        return status, text, str(self.passed()[-1]["upstream"])

    def seen_by_superlink(self) -> str:
        return (self.folder / "superlink.log").read_text()

    def control(self, method: str, question) -> bytes:
        """A call of the Control API by who sits at the coordinator's machine."""
        body = question.SerializeToString()
        status, text = send(self.superlink, request("POST", f"/v1/control/{method}", body), self.authority)
        assert status == 200, text
        return text.split("\r\n\r\n", 1)[1].encode("latin-1")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory, tiny_prior):
    """SuperLink with TLS and node authentication, delivery, and nginx before both."""
    folder = tmp_path_factory.mktemp("study")
    write_certificates(folder, ["localhost", "127.0.0.1"])
    found = Deployment(folder, *free_ports(3))
    with ExitStack() as stack:
        superlink = process(
            folder / "superlink.log",
            BIN / "flower-superlink",
            "--host",
            "127.0.0.1",
            "--port",
            found.superlink,
            "--ssl-ca-certfile",
            "ca.crt",
            "--ssl-certfile",
            "server.crt",
            "--ssl-keyfile",
            "server.key",
            "--enable-supernode-auth",
            "--database",
            "state.db",
            "--disable-runtime-dependency-installation",
            home=folder / "flwr",
        )
        stack.enter_context(superlink)
        stack.enter_context(delivering(found, tiny_prior))
        config = write_gateway(
            folder, ["localhost", "127.0.0.1"], found.gateway, found.superlink, found.delivery, ["127.0.0.1"], LIMITS
        )
        log = folder / "gateway" / "error.log"
        stack.enter_context(process(log, NGINX, "-c", config, "-e", log, "-g", "daemon off;", home=folder))
        for port, name in ((found.gateway, "gateway"), (found.superlink, "superlink")):
            wait_for(lambda port=port: listens(port), name, log, folder / "superlink.log")
        yield found


@contextmanager
def delivering(found: Deployment, tiny_prior: Path):
    """The delivery service with a small released set."""
    run = finished_run(found.folder / "pilot", tiny_prior)
    (found.folder / "server.key").chmod(0o600)
    issue_token(found.folder, "another-site")
    offer = Offer("pilot", "epsilon 7.90", open_released_set(run.path / "synthetic"), None, 0)
    with Service(found.folder, offer, "127.0.0.1", found.delivery):
        yield


def test_a_supernode_takes_part_in_a_round_through_the_gateway(deployment, tmp_path):
    """It joins, beats, is sent code and arrays, answers and leaves; each path of the list is needed for that."""
    public_key = write_node_key(tmp_path / "node_key")
    deployment.control("register-node", control_pb2.RegisterNodeRequest(public_key=public_key))
    (port,) = free_ports(1)
    node = process(
        tmp_path / "node.log",
        BIN / "flower-supernode",
        "--superlink",
        f"localhost:{deployment.gateway}",
        "--root-certificates",
        deployment.authority,
        "--auth-supernode-private-key",
        tmp_path / "node_key",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        home=tmp_path / "flwr",
    )
    content = build_fab_from_disk(write_app(tmp_path / "app"))
    start = control_pb2.StartRunRequest(fab=fab_to_proto(Fab("", content, {})))
    with node:
        run_id = control_pb2.StartRunResponse.FromString(deployment.control("start-run", start)).run_id
        runs = control_pb2.ListRunsRequest(run_id=run_id)

        def finished() -> bool:
            answer = control_pb2.ListRunsResponse.FromString(deployment.control("list-runs", runs))
            return answer.run_dict[run_id].status.status == "finished"

        wait_for(finished, "end of the run", deployment.folder / "superlink.log", tmp_path / "node.log")
        answer = control_pb2.ListRunsResponse.FromString(deployment.control("list-runs", runs))
        assert answer.run_dict[run_id].status.sub_status == "completed", answer
    mine = [line for line in deployment.passed() if line["upstream"] == f"127.0.0.1:{deployment.superlink}"]
    assert {line["request"] for line in mine} == {f"POST {path}" for path in FLEET_PATHS}
    assert {line["status"] for line in mine} == {200}


@pytest.mark.parametrize(("method", "target"), REFUSED, ids=lambda value: value)
def test_the_gateway_refuses_what_reaches_the_superlink_directly(deployment, method, target):
    before = len(deployment.seen_by_superlink())
    status, text, upstream = deployment.ask(request(method, target))
    assert (status, upstream) == (404, ""), text
    assert target not in deployment.seen_by_superlink()[before:]
    _, text = send(deployment.superlink, request(method, target), deployment.authority)
    assert "server: uvicorn" in text.lower()


def test_the_control_api_answers_whoever_reaches_it(deployment):
    """Why the gateway must be there."""
    deployment.control("list-runs", control_pb2.ListRunsRequest())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("CONNECT /", {405}),
        ("CONNECT 127.0.0.1:22", {400, 405}),
        (f"TRACE {LISTED}", {405}),
        ("POST /../../etc/passwd", {400}),
        (f"POST {LISTED}%00", {400}),
        (f"post {LISTED}", {400}),
        ("POST http://other.test/v1/control/list-runs", {421}),
        ("POST http://localhost/v1/control/list-runs", {404}),
    ],
)
def test_what_is_no_request_for_a_path_is_refused(deployment, line, expected):
    status, text, upstream = deployment.ask(request(*line.split(" ")))
    assert status in expected and upstream == "", text


def test_a_listed_path_without_a_signature_is_the_superlinks_to_refuse(deployment):
    status, text, upstream = deployment.ask(request("POST", LISTED))
    assert status == 401 and upstream and "Invalid SuperNode authentication" in text
    assert "server: nginx\r" in text.lower() and "uvicorn" not in text.lower(), "more is told than what must be"


def test_a_body_beyond_the_limit_is_refused(deployment):
    oversized = request("POST", LISTED, bytes(LIMITS.max_body_bytes + 1))
    status, _, upstream = deployment.ask(oversized)
    assert (status, upstream) == (413, "")
    assert send(deployment.superlink, oversized, deployment.authority)[0] not in (0, 413)
    status, _, upstream = deployment.ask(request("POST", LISTED, bytes(LIMITS.max_body_bytes)))
    assert status not in (0, 413, 500, 502) and upstream
    assert not list((deployment.folder / "gateway" / "tmp").rglob("*"))[5:], "a body was written to the disk"


def test_a_study_is_told_by_its_name(deployment):
    assert deployment.ask(request("POST", LISTED, host="other.test"))[::2] == (421, "")
    assert deployment.ask(request("POST", LISTED), name=None)[0] == 401, "a site may call an address without a name"


def test_plain_http_is_refused(deployment):
    assert deployment.ask(request("POST", LISTED), authority=None)[::2] == (400, "")


def test_a_site_that_trusts_another_authority_does_not_speak_to_the_gateway(deployment, tmp_path):
    write_certificates(tmp_path, ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError):
        send(deployment.gateway, request("POST", LISTED), tmp_path / "ca.crt")


@pytest.mark.tool("openssl")
@pytest.mark.parametrize(("version", "accepted"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_old_tls_is_refused(deployment, version, accepted):
    option = {"TLSv1_1": "-tls1_1", "TLSv1_2": "-tls1_2", "TLSv1_3": "-tls1_3"}[version]
    shown = subprocess.run(
        [
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{deployment.gateway}",
            "-servername",
            "localhost",
            option,
            "-cipher",
            "ALL:@SECLEVEL=0",
            "-CAfile",
            deployment.authority,
            "-verify_return_error",
        ],
        input=b"",
        capture_output=True,
        timeout=20,
    )
    assert (b"Verification: OK" in shown.stdout and shown.returncode == 0) == accepted, shown.stderr


def test_one_address_cannot_hold_all_connections(deployment):
    """Requests that are begun and never finished."""
    begun = request("POST", LISTED, bytes(1000))[:-10]
    with ExitStack() as stack:
        for _ in range(LIMITS.connections):
            stack.enter_context(connect(deployment.gateway, deployment.authority)).sendall(begun)

        def refused() -> bool:
            return send(deployment.gateway, request("POST", LISTED), deployment.authority)[0] == 503

        wait_for(refused, "refusal of one connection more", seconds=10)
    wait_for(lambda: not refused(), "end of the refusal", seconds=10)


def test_grpc_health_passes_and_no_other_method(deployment):
    credentials = grpc.ssl_channel_credentials(deployment.authority.read_bytes())
    question = health_pb2.HealthCheckRequest()
    with (
        grpc.secure_channel(f"localhost:{deployment.gateway}", credentials) as outside,
        grpc.secure_channel(f"localhost:{deployment.delivery}", credentials) as inside,
    ):
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in (outside, inside)]
        for stub in stubs:
            assert stub.Check(question, timeout=20).status == health_pb2.HealthCheckResponse.SERVING

        def unimplemented() -> bool:
            with pytest.raises(grpc.RpcError) as refused:
                next(stubs[0].Watch(question, timeout=20))
            return refused.value.code() == grpc.StatusCode.UNIMPLEMENTED

        # nginx ends the stream without trailers: grpc's client may see the end before it has read what the 404 means.
        wait_for(unimplemented, "the refusal as what it is", seconds=20)


def test_synthetic_cases_come_through_the_gateway_with_a_token_only(deployment, tmp_path):
    token_file = tmp_path / "delivery.token"
    write_secret(token_file, issue_token(deployment.folder, "a").encode())
    source = Source(f"localhost:{deployment.gateway}", deployment.authority, token_file)
    everything = Query((), None, 0, 0)
    released = read_index(deployment.folder / "pilot" / "synthetic")
    assert fetch(source, tmp_path / "got", everything, 20.0).num_cases == len(released)
    assert read_index(tmp_path / "got") == released
    write_secret(token_file, token_file.read_bytes()[::-1])
    with pytest.raises(UserError, match="token"):
        fetch(source, tmp_path / "none", everything, 20.0)
    # The gateway says whose call it is, whatever the caller says of itself.
    credentials = grpc.ssl_channel_credentials(deployment.authority.read_bytes())
    time.sleep(1.1)  # refusals are noted once a second
    forged = (("x-forwarded-for", "203.0.113.9"),)
    with (
        grpc.secure_channel(f"localhost:{deployment.gateway}", credentials) as channel,
        pytest.raises(grpc.RpcError),
    ):
        DeliveryStub(channel).Describe(DescribeRequest(), timeout=20, metadata=forged)
    log = (deployment.folder / "logs" / "delivery.log").read_text()
    assert "203.0.113.9" not in log and '"client": "127.0.0.1"' in log.splitlines()[-1]


def test_a_superlink_without_the_studys_certificate_is_given_nothing(deployment, tmp_path):
    """Whoever has taken the SuperLink's port on the coordinator's machine; and one address cannot flood the gateway."""
    write_certificates(tmp_path, ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    for name in ("ca.crt", "server.crt", "server.key"):
        shutil.copy(deployment.folder / name, tmp_path / name)
    gateway, delivery = free_ports(2)
    received = []

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                plain, _address = listener.accept()
            except OSError:  # the end of the test
                return
            with plain:
                plain.settimeout(10)
                try:
                    with context.wrap_socket(plain, server_side=True) as connection:
                        received.append(connection.recv(1000))
                except OSError:
                    received.append(b"")

    with ThreadPoolExecutor(8) as pool, socket.create_server(("127.0.0.1", 0)) as listener:
        rogue = listener.getsockname()[1]
        config = write_gateway(
            tmp_path, ["localhost"], gateway, rogue, delivery, ["127.0.0.1"], Limits(requests_per_s=1, burst=2)
        )
        log = tmp_path / "gateway" / "error.log"
        pool.submit(answer, listener)
        with process(log, NGINX, "-c", config, "-e", log, "-g", "daemon off;", home=tmp_path):
            wait_for(lambda: listens(gateway), "gateway", log)
            question = request("POST", LISTED, b"x")
            asked = [pool.submit(send, gateway, question, tmp_path / "ca.crt") for _ in range(7)]
            statuses = [one.result()[0] for one in asked]
        listener.shutdown(socket.SHUT_RDWR)
    assert set(received) == {b""}
    assert statuses.count(502) == len(received) >= 3, "the burst and what a second lets through"
    assert set(statuses) == {502, 503}
