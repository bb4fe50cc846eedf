"""Who is let in, and who is not: tokens, certificates, the health check, shares of calls."""

import json
import stat
import threading
import time
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcmr.client import cli as client_cli
from fedcmr.server import cli as server_cli
from fedcmr.server.delivery import interceptor
from fedcmr.server.delivery.interceptor import CALLS_PER_SITE, HEALTH_CHECK, client_of
from fedcmr.server.delivery.serve import Service
from fedcmr.server.delivery.tokens import issue_token, revoke_token
from fedcmr.server.deployment.authority import issue_server_certificate, make_authority
from fedcmr.shared.delivery.contract import SERVICE
from fedcmr.shared.delivery.delivery_pb2 import DescribeRequest, Description, SampleRequest, Selection, StreamRequest
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryStub
from fedcmr.shared.errors import UserError
from tests.server.delivery.conftest import stub_of

PATIENCE_S = 120.0


def code_of(call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        answer = call()
        if hasattr(answer, "__next__"):
            next(answer)
    return caught.value.code().name


def set_token(place, token: str) -> None:
    place.token_file.write_text(token)


def test_a_wrong_token_is_refused(service, place, fetch, tmp_path, capsys):
    token = place.token
    for wrong in (token[:-1] + ("A" if token[-1] != "A" else "B"), "x" * 40):
        set_token(place, wrong)
        assert fetch(service.port) == 2
        assert "does not accept this token" in (shown := capsys.readouterr().err) and wrong not in shown
    assert not (tmp_path / "out").exists()
    lines = place.audit()
    assert {line["code"] for line in lines} == {"UNAUTHENTICATED"} and lines[0]["site"] is None


@pytest.mark.parametrize("token", [None, "", "x" * 43, "é" * 30])
def test_no_method_answers_without_a_token(service, place, token):
    request = StreamRequest(release_sha256="0" * 64)
    metadata = None if token is None else (("authorization", f"Bearer {token}".encode().decode("latin-1")),)
    if token and not token.isascii():
        metadata = (("authorization-bin", token.encode()),)
    with stub_of(place, service.port, None) as stub:
        assert code_of(lambda: stub.Describe(DescribeRequest(), metadata=metadata)) == "UNAUTHENTICATED"
        assert code_of(lambda: stub.Stream(request, metadata=metadata)) == "UNAUTHENTICATED"
        assert code_of(lambda: stub.Sample(SampleRequest(), metadata=metadata)) == "UNAUTHENTICATED"


def test_the_same_token_is_accepted_from_any_grpc_client(service, place):
    with stub_of(place, service.port, place.token) as stub:
        described = stub.Describe(DescribeRequest(selection=Selection(vendors=["GE"])))
    assert described.matching_cases == 8 and described.study == "pilot"


def test_a_revoked_token_ends_even_a_running_stream(service, place, offer):
    other = issue_token(place.folder, "general")
    with stub_of(place, service.port, place.token) as stub:
        stream = stub.Stream(StreamRequest(release_sha256=offer.released.sha256))
        next(stream)
        revoke_token(place.folder, "st-elsewhere")
        num_chunks = 1
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                num_chunks += 1
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED and num_chunks < 2 * 24
    with stub_of(place, service.port, other) as stub:
        assert stub.Describe(DescribeRequest()).matching_cases == 24, "the other site's is as it was"


def test_the_folder_keeps_no_token_and_no_file_of_it_can_be_read_by_others(place, tmp_path, capsys):
    def token(*options) -> int:
        return server_cli.main(["token", str(place.folder), "--site", "general", *map(str, options)])

    assert token("--out", tmp_path / "general.token") == 0
    first = (tmp_path / "general.token").read_text().strip()
    assert token() == 0
    second = capsys.readouterr().out.splitlines()[-1]
    path = place.folder / "delivery" / "tokens.json"
    assert first != second and first not in path.read_text() and second not in path.read_text()
    for secret in (path, tmp_path / "general.token"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert token("--out", tmp_path / "general.token") == 2, "no token is overwritten"
    assert token("--revoke") == 0 and set(json.loads(path.read_text())) == {"st-elsewhere"}
    assert token("--revoke") == 2
    assert "'general' has no token" in capsys.readouterr().err
    assert server_cli.main(["token", str(place.folder), "--site", "../x"]) == 2


def test_another_authority_is_refused_before_the_token_leaves(service, place, fetch, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    make_authority(tmp_path / "other", "pilot")
    assert fetch(service.port, ca=tmp_path / "other" / "ca.crt") == 2
    shown = capsys.readouterr().err
    assert "is not the study's server" in shown and "trying again" not in shown
    assert not (place.folder / "logs" / "delivery.log").exists()


def test_another_name_than_the_certificate_s_is_refused(place, offer, fetch, tmp_path, capsys):
    with Service(place.folder, offer, "127.0.0.2", 0) as service:  # the certificate says 127.0.0.1
        arguments = [
            "fetch",
            tmp_path / "out",
            "--from",
            f"127.0.0.2:{service.port}",
            "--ca",
            place.ca,
            "--token-file",
            place.token_file,
        ]
        assert client_cli.main(list(map(str, arguments))) == 2
    assert "is not the study's server" in capsys.readouterr().err


def test_plain_text_is_refused(service, place):
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        metadata = (("authorization", f"Bearer {place.token}"),)
        assert code_of(lambda: DeliveryStub(channel).Describe(DescribeRequest(), metadata=metadata)) == "UNAVAILABLE"


def test_health_answers_without_a_token_and_nothing_else_of_it_does(service, place):
    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{service.port}", credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert code_of(lambda: stub.Check(health_pb2.HealthCheckRequest(service="other"))) == "NOT_FOUND"
        assert code_of(lambda: stub.Watch(health_pb2.HealthCheckRequest())) == "UNIMPLEMENTED"


def test_silent_callers_take_no_more_than_their_share(service, place):
    """Calls that are opened and send nothing: without a token, of one site, and health checks."""

    over = threading.Event()

    def silent():
        over.wait(PATIENCE_S)
        yield b""

    other = issue_token(place.folder, "general")
    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    own = (("grpc.use_local_subchannel_pool", 1),)  # a connection may have only so many calls; each kind has one
    with ExitStack() as stack:
        stack.callback(over.set)
        held = []
        for method, metadata in (
            (f"/{SERVICE}/Describe", ()),
            (HEALTH_CHECK, ()),
            (f"/{SERVICE}/Describe", (("authorization", f"Bearer {place.token}"),)),
        ):
            channel = stack.enter_context(grpc.secure_channel(f"127.0.0.1:{service.port}", credentials, own))
            held += [channel.stream_unary(method).future(silent(), metadata=metadata) for _ in range(8)]
        refused = [call.exception(timeout=PATIENCE_S).code().name for call in held[:8]]
        assert refused == ["UNAUTHENTICATED"] * 8
        with stub_of(place, service.port, other) as stub:
            assert stub.Describe(DescribeRequest(), timeout=PATIENCE_S).matching_cases == 24
        codes = [call.exception(timeout=PATIENCE_S).code().name for call in held[16:]]
        assert codes.count("RESOURCE_EXHAUSTED") == 8 - CALLS_PER_SITE, "the site's own share is full"
    with stub_of(place, service.port, place.token) as stub:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert isinstance(stub.Describe(DescribeRequest(), timeout=PATIENCE_S), Description)
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline, "a share is given back"


def test_a_site_has_so_many_streams_at_once(service, place, offer):
    request = StreamRequest(release_sha256=offer.released.sha256)
    with stub_of(place, service.port, place.token) as stub:
        streams = [stub.Stream(request) for _ in range(CALLS_PER_SITE)]
        for stream in streams:
            next(stream)
        # Whoever reads on is served; small sets end before they block, so the share is held by what is not read.
        assert code_of(lambda: stub.Stream(StreamRequest(release_sha256="0" * 64))) in (
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
        )
        for stream in streams:
            stream.cancel()


@pytest.mark.parametrize(
    "selection",
    [
        Selection(vendors=["Acme"]),
        Selection(min_ef=0.5, max_ef=0.4),
        Selection(min_ef=float("nan")),
        Selection(max_ef=float("inf")),
        Selection(vendors=["GE"] * 100),
    ],
)
def test_a_request_that_cannot_be_is_refused(service, place, selection):
    with stub_of(place, service.port, place.token) as stub:
        assert code_of(lambda: stub.Describe(DescribeRequest(selection=selection))) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: (place.folder / "server.key").chmod(0o644), "can be read by others"),
        (lambda place: (place.folder / "server.key").unlink(), "expected server.crt and server.key"),
        (lambda place: (place.folder / "server.key").write_text("none"), "belong together"),
        (lambda place: (place.folder / "delivery" / "tokens.json").chmod(0o640), "can be read by others"),
        (lambda place: (place.folder / "delivery" / "tokens.json").unlink(), "'fedcmr-server token' makes it"),
        (lambda place: (place.folder / "delivery" / "tokens.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_folder_that_is_not_in_order_is_not_served(place, offer, spoil, words):
    spoil(place)
    with pytest.raises(UserError, match=words):
        Service(place.folder, offer, "127.0.0.1", 0)


def test_a_port_in_use_is_told(service, place, offer):
    with pytest.raises(UserError, match="is it in use"):
        Service(place.folder, offer, "127.0.0.1", service.port)


def test_a_token_that_others_can_read_is_not_used(service, place, fetch, capsys):
    place.token_file.chmod(0o644)
    assert fetch(service.port) == 2
    assert "chmod 600" in capsys.readouterr().err
    place.token_file.unlink()
    assert fetch(service.port) == 2
    assert "is missing" in capsys.readouterr().err


def test_a_renewed_certificate_is_of_the_same_authority(place, offer, fetch):
    issue_server_certificate(place.folder, ["127.0.0.1"])
    with Service(place.folder, offer, "127.0.0.1", 0) as service:
        assert fetch(service.port) == 0


@contextmanager
def silent_calls(place, port, method, number, let_in, *tokens):
    """Calls that send nothing, `number` of them on a connection of its own for each token (None: without one).

    The block begins when the service waits for the first message of as many as `let_in`, or has done so.
    """
    waited_for = []
    over = threading.Event()

    def silent():
        over.wait(PATIENCE_S)
        yield b""

    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    held = []
    with ExitStack() as stack:
        only = interceptor._only
        stack.enter_context(patch.object(interceptor, "_only", lambda *call: (waited_for.append(call), only(*call))[1]))
        for token in tokens:
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = stack.enter_context(grpc.secure_channel(f"127.0.0.1:{port}", credentials, options))
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            held += [channel.stream_unary(method).future(silent(), metadata=metadata) for _ in range(number)]
        try:
            deadline = time.monotonic() + PATIENCE_S
            while len(waited_for) < let_in:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield held
        finally:
            for call in held:
                call.cancel()
            over.set()


def healthy(place, port):
    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_silent_health_checks_do_not_hide_the_services_health(service, place):
    """Four of them, of anybody, once blocked everybody's for as long as they liked."""
    with silent_calls(place, service.port, HEALTH_CHECK, 4, 4, None, None) as held:
        assert healthy(place, service.port)
        codes = [call.exception(timeout=PATIENCE_S).code().name for call in held]
        assert set(codes) <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}, "none stays"
        assert codes.count("RESOURCE_EXHAUSTED") == 4, "two of each connection were let in"
    assert healthy(place, service.port)


def test_silent_sites_take_no_place_of_another_one(service, place):
    others = [issue_token(place.folder, name) for name in ("s1", "s2", "s3", "s4")]
    with silent_calls(place, service.port, f"/{SERVICE}/Describe", 4, 16, *others) as held:
        with stub_of(place, service.port, place.token) as stub:
            assert stub.Describe(DescribeRequest(), timeout=PATIENCE_S).matching_cases == 24
        assert healthy(place, service.port)
        for call in held:
            assert call.exception(timeout=PATIENCE_S) is not None, "a silent call ends by itself"
    assert {line["code"] for line in place.audit()} <= {"OK", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"}


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("ipv4:127.0.0.1:5000", "203.0.113.9", "203.0.113.9"),  # the gateway's word
        ("ipv6:%5B::1%5D:5000", "2001:db8::7", "2001:db8::7"),
        ("ipv4:127.0.0.1:5000", "", "127.0.0.1"),
        ("ipv4:198.51.100.4:5000", "203.0.113.9", "198.51.100.4"),  # a stranger's
        ("ipv6:%5B2001:db8::4%5D:5000", "127.0.0.1", "2001:db8::4"),
        ("ipv4:127.0.0.1:5000", "203.0.113.9, 10.0.0.1", "127.0.0.1"),  # not as the gateway writes it
        ("ipv4:127.0.0.1:5000", "x" * 5000, "127.0.0.1"),
    ],
)
def test_the_gateway_alone_is_believed_about_where_a_call_comes_from(peer, forwarded, client):
    assert client_of(peer, forwarded) == client


def test_guessing_is_logged_with_the_guessers_address(service, place):
    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{service.port}", credentials) as channel:
        metadata = (("authorization", "Bearer fedcmr_no"), ("x-forwarded-for", "203.0.113.9"))
        assert (
            code_of(lambda: DeliveryStub(channel).Describe(DescribeRequest(), metadata=metadata)) == "UNAUTHENTICATED"
        )
    (line,) = place.audit()
    assert line["client"] == "203.0.113.9" and line["peer"].startswith("ipv4:127.0.0.1:")
