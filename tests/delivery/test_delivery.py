"""Synthetic patients come back to the partners: whole or by choice, after broken connections, and by token only."""

import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import client.fetch as client_fetch
from client.cli import main as client
from client.fetch import fetch
from server.cli import main as server_main
from server.delivery.service import SERVICE, DeliveryService, make_server
from server.delivery.tokens import TOKENS_NAME, issue_token, revoke_token
from server.release import checksums
from shared.case import load_cases, read_index, save_case, write_index
from shared.delivery import delivery_pb2 as wire
from shared.delivery import delivery_pb2_grpc
from shared.errors import UserError
from tests.conftest import make_case

ROOT = Path(__file__).resolve().parents[2]
VENDORS = ("Siemens", "Philips", "GE")


def server(*arguments):
    return server_main([str(argument) for argument in arguments])


def write_set(folder: Path, count: int) -> None:
    """A released folder."""
    cases = [make_case(f"s{index:05d}", VENDORS[index % 3], index) for index in range(count)]
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])
    seal(folder)


def seal(folder: Path) -> None:
    (folder / "DATASHEET.md").write_text("# Datasheet\n")
    (folder / "SHA256SUMS").write_text(checksums(folder))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("delivery") / "coordinator"
    assert server("init", folder, "--name", "study", "--address", "127.0.0.1") == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("delivery") / "synthetic"
    write_set(folder, 9)
    return folder


@pytest.fixture
def token(coordinator):
    return issue_token(coordinator, "a")


@pytest.fixture
def serve(coordinator):
    """`serve(service)` starts it on a free port, or on the one given; returns the address."""
    running = []

    def start(service, port=0):
        made, bound = make_server(service, coordinator / "server.crt", coordinator / "server.key", f"127.0.0.1:{port}")
        made.start()
        running.append(made)
        return f"127.0.0.1:{bound}"

    yield start
    for made in running:
        made.stop(None).wait()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client_fetch, "WAITS_S", (0.05,) * 5)


def test_a_fetched_set_is_the_released_one(coordinator, data, token, serve, tmp_path):
    address = serve(DeliveryService(data, coordinator))
    assert fetch(tmp_path / "got", address, coordinator / "ca.crt", token) == 9
    assert read_index(tmp_path / "got") == read_index(data)
    for path in (data / "cases").iterdir():
        assert (tmp_path / "got" / "cases" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "got" / "DATASHEET.md").read_bytes() == (data / "DATASHEET.md").read_bytes()
    assert not (tmp_path / "got" / "fetched.jsonl").exists()


def test_styles_and_ejection_fractions_are_chosen(coordinator, data, token, serve, tmp_path):
    address = serve(DeliveryService(data, coordinator))
    fetch(tmp_path / "got", address, coordinator / "ca.crt", token, ["GE", "Philips"], (0.3, 0.6))
    expected = [i for i in read_index(data) if i.vendor in ("GE", "Philips") and 0.3 <= i.ef <= 0.6]
    assert 0 < len(expected) < 6 and read_index(tmp_path / "got") == expected
    with pytest.raises(UserError, match="no case of the release matches"):
        fetch(tmp_path / "none", address, coordinator / "ca.crt", token, ["Canon"])


@pytest.mark.parametrize("wrong", ["", "guessed", "Bearer x"])
def test_without_a_valid_token_nothing_is_told(coordinator, data, serve, tmp_path, wrong):
    address = serve(DeliveryService(data, coordinator))
    with pytest.raises(UserError, match="refuses the token"):
        fetch(tmp_path / "got", address, coordinator / "ca.crt", wrong)
    assert not (tmp_path / "got").exists()


def test_a_new_token_voids_the_old_one_and_a_revoked_one_is_none(coordinator, data, serve, tmp_path):
    address = serve(DeliveryService(data, coordinator))
    old, new = issue_token(coordinator, "b"), issue_token(coordinator, "b")
    with pytest.raises(UserError, match="refuses the token"):
        fetch(tmp_path / "x", address, coordinator / "ca.crt", old)
    assert fetch(tmp_path / "y", address, coordinator / "ca.crt", new) == 9
    revoke_token(coordinator, "b")
    with pytest.raises(UserError, match="refuses the token"):
        fetch(tmp_path / "z", address, coordinator / "ca.crt", new)
    kept = (coordinator / TOKENS_NAME).read_text()
    assert old not in kept and new not in kept and (coordinator / TOKENS_NAME).stat().st_mode & 0o077 == 0


def test_another_server_and_one_without_tls_get_no_token(coordinator, data, token, tmp_path):
    assert server("init", tmp_path / "other", "--name", "study", "--address", "127.0.0.1") == 0
    rogue, port = make_server(DeliveryService(data, coordinator), tmp_path / "other" / "server.crt",
                              tmp_path / "other" / "server.key", "127.0.0.1:0")  # fmt: skip
    rogue.start()
    plain = grpc.server(ThreadPoolExecutor(2))
    delivery_pb2_grpc.add_DeliveryServicer_to_server(DeliveryService(data, coordinator), plain)
    plain_port = plain.add_insecure_port("127.0.0.1:0")
    plain.start()
    try:
        for number in (port, plain_port):
            with pytest.raises(UserError, match="is not reached"):
                fetch(tmp_path / "got", f"127.0.0.1:{number}", coordinator / "ca.crt", token)
    finally:
        rogue.stop(None)
        plain.stop(None)


def test_health_needs_no_token(coordinator, data, serve):
    address = serve(DeliveryService(data, coordinator))
    credentials = grpc.ssl_channel_credentials((coordinator / "ca.crt").read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


class Breaking(DeliveryService):
    """Breaks off in the middle of every third case."""

    streams = 0

    def Stream(self, request, context):  # noqa: N802
        self.streams += 1
        for number, chunk in enumerate(super().Stream(request, context)):
            if number == 5:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield chunk


def test_a_broken_connection_goes_on_after_the_last_whole_case(coordinator, data, token, serve, tmp_path):
    service = Breaking(data, coordinator)
    assert fetch(tmp_path / "got", serve(service), coordinator / "ca.crt", token) == 9
    assert service.streams > 3
    assert read_index(tmp_path / "got") == read_index(data) and len(load_cases(tmp_path / "got")) == 9


class Dying(Breaking):
    """Its whole server goes away with the second stream."""

    server = None

    def Stream(self, request, context):  # noqa: N802
        if self.streams:
            threading.Thread(target=self.server.stop, args=(None,)).start()
        yield from super().Stream(request, context)


class Noting(DeliveryService):
    """Notes after which case it is asked."""

    def Stream(self, request, context):  # noqa: N802
        self.asked = request.after
        yield from super().Stream(request, context)


def test_after_a_server_died_the_same_command_asks_only_for_what_is_missing(coordinator, data, token, serve, tmp_path):
    service = Dying(data, coordinator)
    files = coordinator / "server.crt", coordinator / "server.key"
    service.server, port = make_server(service, *files, "127.0.0.1:0")
    service.server.start()
    with pytest.raises(UserError, match="goes on where it stopped"):
        fetch(tmp_path / "got", f"127.0.0.1:{port}", coordinator / "ca.crt", token)
    arrived = len((tmp_path / "got" / "fetched.jsonl").read_text().splitlines()) - 1
    assert 0 < arrived < 9
    again = Noting(data, coordinator)
    assert fetch(tmp_path / "got", serve(again), coordinator / "ca.crt", token) == 9
    assert again.asked == f"s{arrived - 1:05d}" and read_index(tmp_path / "got") == read_index(data)


def test_another_release_does_not_continue_a_folder(coordinator, data, token, serve, tmp_path):
    shutil.copytree(data, tmp_path / "second")
    (tmp_path / "second" / "SHA256SUMS").unlink()
    (tmp_path / "second" / "labels.csv").write_text("")
    seal(tmp_path / "second")
    service = Breaking(data, coordinator)
    (tmp_path / "got").mkdir()
    asked = {"release": service.release, "vendors": [], "ef": [0.0, 1.0]}
    (tmp_path / "got" / "fetched.jsonl").write_text(json.dumps(asked) + "\n")
    with pytest.raises(UserError, match="was begun for another release"):
        fetch(tmp_path / "got", serve(DeliveryService(tmp_path / "second", coordinator)), coordinator / "ca.crt", token)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").touch()
    with pytest.raises(UserError, match="holds other files"):
        fetch(tmp_path / "full", serve(service), coordinator / "ca.crt", token)


def hostile(change):
    """A service whose first header, or content, is changed."""

    class Hostile(DeliveryService):
        def _case(self, info):
            chunks = list(super()._case(info))
            yield from change(chunks[0].header, b"".join(chunk.data for chunk in chunks[1:]))

    return Hostile


def header_with(**changes):
    def change(header, data):
        for name, value in changes.items():
            setattr(header, name, value)
        return [wire.Chunk(header=header), wire.Chunk(data=data)]

    return change


def garbage(header, data):
    data = b"PK\x03\x04" + data[4:40]
    header.num_bytes, header.sha256 = len(data), hashlib.sha256(data).hexdigest()
    return [wire.Chunk(header=header), wire.Chunk(data=data)]


def pickled(header, data):
    buffer = io.BytesIO()
    np.savez(buffer, frames=np.array([{}], dtype=object), masks=np.zeros(1), spacing_mm=np.zeros(3))
    data = buffer.getvalue()
    header.num_bytes, header.sha256 = len(data), hashlib.sha256(data).hexdigest()
    return [wire.Chunk(header=header), wire.Chunk(data=data)]


@pytest.mark.parametrize(
    "change",
    [
        header_with(pseudonym="../../evil"), header_with(pseudonym=""), header_with(pseudonym="/etc/x"),
        header_with(sha256="0" * 64), header_with(num_bytes=2**40), header_with(num_bytes=10),
        header_with(num_bytes=0), header_with(vendor="Dr. Who"), header_with(ef=7.0), header_with(group="a b"),
        header_with(field_strength_t=-1.0), garbage, pickled,
        lambda header, data: [wire.Chunk(data=data)],
        lambda header, data: [wire.Chunk(header=header), wire.Chunk(header=header)],
        lambda header, data: [wire.Chunk(header=header), wire.Chunk(data=data[:-1])],
    ],
)  # fmt: skip
def test_what_is_no_case_is_not_kept(coordinator, data, token, serve, tmp_path, change):
    address = serve(hostile(change)(data, coordinator))
    with pytest.raises(UserError, match="sends what is no synthetic case"):
        fetch(tmp_path / "a" / "got", address, coordinator / "ca.crt", token)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a/got/fetched.jsonl"}


def test_memory_stays_flat(coordinator, token, serve, tmp_path):
    """Twenty times the cases take the same memory, on both sides, which are one process here."""
    folder = tmp_path / "many"
    write_set(folder, 3)
    content = (folder / "cases" / "s00000.npz").read_bytes()
    infos = read_index(folder)
    peaks = []
    for count in (20, 400):
        for index in range(count):
            (folder / "cases" / f"s{index:05d}.npz").write_bytes(content)
        write_index(folder, [replace(infos[0], pseudonym=f"s{i:05d}", group=f"s{i:05d}") for i in range(count)])
        (folder / "SHA256SUMS").unlink()
        seal(folder)
        address = serve(DeliveryService(folder, coordinator))
        tracemalloc.start()
        assert fetch(tmp_path / f"got{count}", address, coordinator / "ca.crt", token) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2_000_000, peaks


def test_the_commands_deliver_and_fetch(coordinator, data, tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert server("token", coordinator, "--site", "a", "--out", tmp_path / "a.token") == 0
    assert server("token", coordinator, "--site", "a", "--out", tmp_path / "a.token") == 2
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "deliver",
        coordinator,
        "--data",
        data,
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert "delivering 9 synthetic patients" in process.stdout.readline()
        arguments = ["fetch", str(tmp_path / "got"), "--from", f"127.0.0.1:{port}", "--authority",
                     str(coordinator / "ca.crt"), "--token-file", str(tmp_path / "a.token")]  # fmt: skip
        assert client([*arguments, "--vendor", "GE"]) == 0
        assert "3 synthetic patients" in capsys.readouterr().out
        assert client([*arguments, "--ef", "0.6", "0.2"]) == 2
        assert "LOW <= HIGH" in capsys.readouterr().err
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert server("deliver", coordinator, "--data", tmp_path) == 2
    assert "give a synthetic data set" in capsys.readouterr().err
    assert server("token", coordinator, "--site", "nobody", "--revoke") == 2


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    pytest.importorskip("grpc_tools")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}",
               f"--grpc_python_out={tmp_path}", "shared/delivery/delivery.proto"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    for path in (tmp_path / "shared" / "delivery").iterdir():
        assert path.read_text() == (ROOT / "shared" / "delivery" / path.name).read_text(), "run 'make proto'"
