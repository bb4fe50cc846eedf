"""`fedcmr-client fetch`: a synthetic data set from the coordinator, over TLS, whole or in part.

    DST/cases/<pseudonym>.npz, cases.csv, DATASHEET.md   a folder of cases like any other
    DST/fetched.jsonl                                    while it is not complete: what has arrived, to go on from

What comes over the network is taken for a stranger's until it has been checked: names, sizes, hash and content.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import grpc

from shared.case import PSEUDONYM, VENDORS, CaseInfo, load_case, write_index
from shared.checkpoint import write_atomically
from shared.delivery import delivery_pb2 as wire
from shared.delivery import delivery_pb2_grpc
from shared.errors import UserError
from shared.progress import track

PROGRESS_NAME, DATASHEET_NAME = "fetched.jsonl", "DATASHEET.md"
MAX_CASE_BYTES, MAX_MESSAGE_BYTES = 64 * 2**20, 4 * 2**20
WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""After a broken connection; whatever arrives begins them anew."""
DESCRIBE_S = 30.0
BROKEN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL,
          grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN)  # fmt: skip


def fetch(
    destination: Path,
    address: str,
    authority: Path,
    token: str,
    vendors: Sequence[str] = (),
    ef_range: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Bring the cases that match; goes on where an earlier call stopped.

    Args:
        destination: New or empty folder, or one that an earlier call began with the same arguments.
        address: HOST:PORT of the delivery.
        authority: PEM file of the study's certificate authority.
        token: The site's.
        vendors: Only these styles; none: all.
        ef_range: Only ejection fractions from - to, fractions, both included.

    Returns:
        The number of cases in the folder.

    Raises:
        UserError: Token or server are refused, nothing matches, the server sends what is no case, or the folder holds
            something else.
    """
    try:
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    except OSError:
        raise UserError(f"{authority} cannot be read: give the coordinator's ca.crt") from None
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.keepalive_time_ms", 30000)]
    with grpc.secure_channel(address, credentials, options=options) as channel:
        stub = delivery_pb2_grpc.DeliveryStub(channel)
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            found = stub.Describe(wire.DescribeRequest(), metadata=metadata, timeout=DESCRIBE_S)
        except grpc.RpcError as error:
            raise UserError(_reason(address, error)) from None
        request = wire.StreamRequest(
            release=found.release, vendors=sorted(vendors), ef_min=ef_range[0], ef_max=ef_range[1]
        )
        progress = _Progress(destination, request)
        for info in track(_cases(stub, request, metadata, progress, address), "fetching synthetic cases"):
            progress.add(info)
    if not progress.infos:
        raise UserError(f"no case of the release matches: it has {dict(found.per_vendor)}")
    write_atomically(destination / DATASHEET_NAME, found.datasheet)
    write_index(destination, progress.infos)
    progress.finish()
    return len(progress.infos)


class _Progress:
    """What has arrived, on the disk after every case."""

    def __init__(self, destination: Path, request: wire.StreamRequest) -> None:
        self.destination, self.path, self.infos = destination, destination / PROGRESS_NAME, list[CaseInfo]()
        asked = {"release": request.release, "vendors": list(request.vendors), "ef": [request.ef_min, request.ef_max]}
        if self.path.is_file():
            first, *rest = self.path.read_text(encoding="utf-8").splitlines() or ["{}"]
            if json.loads(first) != asked:
                raise UserError(f"{destination} was begun for another release or choice: take a new folder")
            self.infos = [CaseInfo(**json.loads(line)) for line in rest if line.endswith("}")]
        elif destination.exists() and any(destination.iterdir()):
            raise UserError(f"{destination} holds other files: give a new or empty folder")
        else:
            destination.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(asked) + "\n", encoding="utf-8")

    @property
    def last(self) -> str:
        return self.infos[-1].pseudonym if self.infos else ""

    def add(self, info: CaseInfo) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(info)) + "\n")
        self.infos.append(info)

    def finish(self) -> None:
        self.path.unlink()


def _cases(
    stub: delivery_pb2_grpc.DeliveryStub, request: wire.StreamRequest, metadata: tuple[tuple[str, str], ...],
    progress: _Progress, address: str,
) -> Iterator[CaseInfo]:  # fmt: skip
    """Every case that is still missing, written and checked; a broken connection is made again."""
    failures = 0
    while True:
        request.after = progress.last
        try:
            for info in _received(stub.Stream(request, metadata=metadata), progress.destination, progress.last):
                failures = 0
                yield info
            return
        except grpc.RpcError as error:
            if error.code() not in BROKEN or failures == len(WAITS_S):
                raise UserError(_reason(address, error)) from None
        time.sleep(WAITS_S[failures])
        failures += 1


def _received(chunks: Iterator[wire.Chunk], destination: Path, last: str) -> Iterator[CaseInfo]:
    """One stream's cases, each written once it is whole and what it should be."""
    header, content = None, bytearray()
    for chunk in chunks:
        if chunk.HasField("header"):
            _expect(header is None)
            header, content = chunk.header, bytearray()
            _expect(PSEUDONYM.fullmatch(header.pseudonym) is not None and header.pseudonym > last)
            _expect(0 < header.num_bytes <= MAX_CASE_BYTES)
        else:
            _expect(header is not None)
            content += chunk.data
        assert header is not None
        _expect(len(content) <= header.num_bytes)
        if len(content) == header.num_bytes:
            yield _kept(destination, header, bytes(content))
            last, header = header.pseudonym, None
    _expect(header is None)


def _kept(destination: Path, header: wire.CaseHeader, content: bytes) -> CaseInfo:
    """Write one case, and read it again as whoever uses it will."""
    _expect(hashlib.sha256(content).hexdigest() == header.sha256)
    _expect(header.vendor in VENDORS and 0 <= header.ef <= 1 and PSEUDONYM.fullmatch(header.group) is not None)
    strength = header.field_strength_t
    _expect(math.isnan(strength) or 0 < strength < 30)
    info = CaseInfo(header.pseudonym, header.vendor, strength, header.ef, header.group)
    path = destination / "cases" / f"{info.pseudonym}.npz"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, content)
    try:
        load_case(destination, info)
    except UserError:
        path.unlink()
        _expect(False)
    return info


def _expect(condition: bool) -> None:
    if not condition:
        raise UserError("the server sends what is no synthetic case: nothing of it was kept; ask the coordinator")


def _reason(address: str, error: grpc.RpcError) -> str:
    """One line for people."""
    code = error.code()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"{address} refuses the token: ask the coordinator for a new one"
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return f"{address}: {error.details()}"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} is no delivery of this version: update one of both"
    return (f"{address} is not reached ({code.name}): is the address right, is --authority that server's, does the "
            "delivery run? The same command goes on where it stopped")  # fmt: skip
