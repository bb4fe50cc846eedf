"""The gRPC service that streams a released data set, over TLS, to whoever has a token.

One case's file at a time goes through memory, in chunks. The health service (grpc.health.v1) needs no token.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.delivery.tokens import site_of
from server.release import CHECKSUMS_NAME, DATASHEET_NAME
from shared.case import CaseInfo, read_index
from shared.delivery import delivery_pb2 as wire
from shared.delivery import delivery_pb2_grpc
from shared.errors import UserError

CHUNK_BYTES = 256 * 1024
MAX_STREAMS, MAX_ASK_BYTES = 16, 64 * 1024
SERVICE = "fedcmr.delivery.v1.Delivery"
LOG = logging.getLogger("fedcmr.delivery")


class DeliveryService(delivery_pb2_grpc.DeliveryServicer):
    """Answers about one released folder.

    Args:
        data: A folder that `server.release.write_release` made.
        tokens: Folder of `tokens.json`.

    Raises:
        UserError: The folder is no release.
    """

    def __init__(self, data: Path, tokens: Path) -> None:
        for name in (DATASHEET_NAME, CHECKSUMS_NAME):
            if not (data / name).is_file():
                raise UserError(f"{data} has no {name}: give a synthetic data set, as RUN/synthetic")
        self.data, self.tokens = data, tokens
        self.infos = sorted(read_index(data), key=lambda info: info.pseudonym)
        checksums = (data / CHECKSUMS_NAME).read_bytes()
        self.release = hashlib.sha256(checksums).hexdigest()
        lines = (line.split("  ", 1) for line in checksums.decode().splitlines())
        self.sha256 = {path: digest for digest, path in lines}

    def Describe(self, request: wire.DescribeRequest, context: grpc.ServicerContext) -> wire.Description:  # noqa: N802
        """What the release holds."""
        self._site(context)
        return wire.Description(
            release=self.release,
            num_cases=len(self.infos),
            per_vendor=Counter(info.vendor for info in self.infos),
            datasheet=(self.data / DATASHEET_NAME).read_bytes(),
        )

    def Stream(self, request: wire.StreamRequest, context: grpc.ServicerContext) -> Iterator[wire.Chunk]:  # noqa: N802
        """The cases that match, from the one after `request.after` on."""
        site = self._site(context)
        if request.release != self.release:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another release is delivered by now: begin anew")
        chosen = [info for info in self.infos if _matches(info, request)]
        LOG.info("%s fetches %d cases", site, len(chosen))
        for info in chosen:
            yield from self._case(info)

    def _case(self, info: CaseInfo) -> Iterator[wire.Chunk]:
        relative = f"cases/{info.pseudonym}.npz"
        path = self.data / relative
        yield wire.Chunk(header=wire.CaseHeader(
            pseudonym=info.pseudonym, vendor=info.vendor, field_strength_t=info.field_strength_t, ef=info.ef,
            group=info.group, num_bytes=path.stat().st_size, sha256=self.sha256[relative],
        ))  # fmt: skip
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield wire.Chunk(data=data)

    def _site(self, context: grpc.ServicerContext) -> str:
        """Whose call this is; a call without a token of somebody's ends here."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        site = site_of(self.tokens, str(given).removeprefix("Bearer "))
        if site is None:
            LOG.warning("a call without a valid token was refused")
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
        assert site is not None
        return site


def make_server(service: DeliveryService, certificate: Path, key: Path, address: str) -> tuple[grpc.Server, int]:
    """A server that is not started yet, and its port.

    Args:
        service: What it answers with.
        certificate: PEM file of the server's certificate.
        key: PEM file of its key.
        address: HOST:PORT; port 0 takes a free one.

    Raises:
        UserError: The files cannot be read, or the port cannot be had.
    """
    try:
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: 'fedcmr-server init' makes it") from None
    server = grpc.server(
        ThreadPoolExecutor(MAX_STREAMS), maximum_concurrent_rpcs=MAX_STREAMS,
        options=[("grpc.max_receive_message_length", MAX_ASK_BYTES), ("grpc.so_reuseport", 0)],
    )  # fmt: skip
    delivery_pb2_grpc.add_DeliveryServicer_to_server(service, server)
    states = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    for name in ("", SERVICE):
        states.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise UserError(f"{address} cannot be listened on: is the port in use, are key and certificate a pair?")
    return server, port


def _matches(info: CaseInfo, request: wire.StreamRequest) -> bool:
    return (
        info.pseudonym > request.after
        and (not request.vendors or info.vendor in request.vendors)
        and request.ef_min <= info.ef <= request.ef_max
    )
