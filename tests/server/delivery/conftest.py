"""A finished run, a coordinator's folder, the real service over TLS on loopback, and a wire that can be cut."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedcmr.client import cli as client_cli
from fedcmr.server.dataset.datasheet import study_facts
from fedcmr.server.dataset.writer import write_release
from fedcmr.server.delivery.on_demand import load_sampler
from fedcmr.server.delivery.released_set import open_released_set
from fedcmr.server.delivery.serve import Service
from fedcmr.server.delivery.service import Offer
from fedcmr.server.delivery.tokens import issue_token
from fedcmr.server.deployment.authority import issue_server_certificate, make_authority, write_secret
from fedcmr.server.federation.outcome import privacy_spent
from fedcmr.server.run_folder import RunFolder, load_run
from fedcmr.server.settings import dump, load
from fedcmr.shared import checkpoint
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryStub, add_DeliveryServicer_to_server
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.provenance import SIMULATED_SCANS
from fedcmr.shared.style import STYLE_NAMES
from tests.conftest import make_case

STYLES = ("GE", "Philips", "Siemens")
PER_VENDOR = 8
SETTINGS = ("device=cpu", "synthesis.num_slices=2", "synthesis.num_steps=1", "synthesis.num_cases=2")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_prior) -> RunFolder:
    """A run whose set is released: 8 cases of each of three vendors."""
    return finished_run(tmp_path_factory.mktemp("runs") / "pilot", tiny_prior)


def finished_run(path: Path, tiny_prior: Path) -> RunFolder:
    path.mkdir()
    (path / "config.yaml").write_text(dump(load("default", [f"prior={tiny_prior}", *SETTINGS])))
    run = load_run(path)
    prior = load_prior(tiny_prior)
    arrays = {f"trainable/{name}": value.detach().numpy() for name, value in prior.generator.trainable().items()}
    for vendor in STYLES:
        arrays |= {
            f"code_mean/{vendor}": np.zeros(len(STYLE_NAMES), np.float32),
            f"code_std/{vendor}": np.ones(len(STYLE_NAMES), np.float32),
        }
    site = {"epsilon": 7.9, "accountant": "prv", "steps": 5, "refused": []}
    generator = path / "generator.safetensors"
    checkpoint.save(generator, arrays, {"prior_sha256": prior.sha256, "delta": 1e-3, "sites": {"a": site}})
    cases = [make_case(f"syn-{i:05d}", STYLES[i % 3], seed=i, num_slices=2) for i in range(3 * PER_VENDOR)]
    efs = [case.info.ef for case in cases]
    facts = study_facts("pilot", run.config, prior, generator, privacy_spent(run), [SIMULATED_SCANS], [])
    write_release(path / "synthetic", cases, efs, efs, facts)
    return run


@pytest.fixture(scope="session")
def sampler(finished):
    return load_sampler(finished)


@dataclass
class Place:
    """A coordinator's folder, and what a site has of it."""

    folder: Path
    ca: Path
    token_file: Path

    @property
    def token(self) -> str:
        return self.token_file.read_text().strip()

    def audit(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "logs" / "delivery.log").read_text().splitlines()]


@pytest.fixture
def place(tmp_path) -> Place:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    make_authority(folder, "pilot")
    issue_server_certificate(folder, ["127.0.0.1"])
    token_file = tmp_path / "delivery.token"
    write_secret(token_file, issue_token(folder, "st-elsewhere").encode())
    return Place(folder, folder / "ca.crt", token_file)


@pytest.fixture
def offer(finished) -> Offer:
    return Offer("pilot", "epsilon 7.90 at delta 0.001", open_released_set(finished.path / "synthetic"), None, 100)


@pytest.fixture
def service(place, offer):
    """The released set, served."""
    with Service(place.folder, offer, "127.0.0.1", 0) as running:
        yield running


@pytest.fixture
def fetch(place, tmp_path):
    """`fetch(port, *options, out=...)` runs `fedcmr-client fetch` and returns its exit code."""

    def run(port: int, *options, out: str = "out", ca: Path | None = None, token_file: Path | None = None) -> int:
        arguments = [
            "fetch",
            tmp_path / out,
            "--from",
            f"127.0.0.1:{port}",
            "--ca",
            ca or place.ca,
            "--token-file",
            token_file or place.token_file,
            *options,
        ]
        return client_cli.main([str(argument) for argument in arguments])

    return run


@contextmanager
def stub_of(place: Place, port: int, token: str | None):
    """A client without our own code: as other programs call the service."""
    credentials = grpc.ssl_channel_credentials(place.ca.read_bytes())
    if token is not None:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        yield DeliveryStub(channel)


@contextmanager
def served(place: Place, servicer, *options):
    """Any servicer behind the study's certificate, without our interceptor; yields its port."""
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    add_DeliveryServicer_to_server(servicer, server)
    pair = [(place.folder / name).read_bytes() for name in ("server.key", "server.crt")]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([tuple(pair)]))
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=None).wait()


class Wire:
    """A TCP relay that cuts one connection after another when so many bytes have come from the server."""

    def __init__(self, target: int, cut_after: list[int], on_cut: Callable[[], object] = lambda: None):
        self._target, self._cuts, self._on_cut = target, list(cut_after), on_cut
        self.num_cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                threading.Thread(target=self._relay, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._relay, args=(far, near, True), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, may_cut: bool) -> None:
        with suppress(OSError):
            passed = 0
            while data := source.recv(4096):
                passed += len(data)
                if may_cut and self._cuts and passed > self._cuts[0]:
                    self._cuts.pop(0)
                    self.num_cut += 1
                    self._on_cut()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
