"""From a delivery service into a folder of cases: what breaks is called again and resumes after the last whole case."""

import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from fedcmr.client.fetch.folder import ReceivedCases
from fedcmr.client.fetch.inbound import Untrustworthy, announced, check_file, expect
from fedcmr.client.fetch.source import Broken, Source, clean, connected, trouble_of
from fedcmr.shared.case import CaseInfo
from fedcmr.shared.delivery.contract import MAX_CASES, PROTOCOL
from fedcmr.shared.delivery.delivery_pb2 import (
    CaseHeader,
    Chunk,
    DescribeRequest,
    Description,
    SampleRequest,
    Selection,
    StreamRequest,
)
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryStub
from fedcmr.shared.errors import UserError
from fedcmr.shared.progress import track

Answer = TypeVar("Answer")
CALL_S, STREAM_S = 30.0, 600.0
"""Deadlines. A longer stream ends with its own and resumes in another one."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
SLACK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Query:
    """What to fetch.

    Attributes:
        vendors: None for all.
        ef: Lowest and highest ejection fraction; None for any.
        num_on_demand: How many cases to sample on demand; 0 for the released ones.
        seed: Seed of the cases sampled on demand.
    """

    vendors: tuple[str, ...] = ()
    ef: tuple[float, float] | None = None
    num_on_demand: int = 0
    seed: int = 0

    @property
    def selection(self) -> Selection:
        """As the service takes it."""
        low, high = self.ef or (None, None)
        return Selection(vendors=self.vendors, min_ef=low, max_ef=high)

    def described(self) -> str:
        """For people; empty where everything is requested."""
        parts = [" and ".join(self.vendors)] if self.vendors else []
        parts += [f"ejection fraction {self.ef[0]:g} to {self.ef[1]:g}"] if self.ef else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Fetched:
    """What a fetch ended with.

    Attributes:
        num_cases: Number of cases in the folder.
        study: Whose they are.
        privacy: The guarantee in one sentence, in the server's words.
    """

    num_cases: int
    study: str
    privacy: str


class _Patience:
    """Waits between tries, longer each time, and gives up when nothing has come for so long."""

    def __init__(self, source: Source, patience_s: float):
        self._source, self._patience_s = source, patience_s
        self.progress()

    def progress(self) -> None:
        """Something has come."""
        self._pause_s, self._since = FIRST_PAUSE_S, time.monotonic()

    def wait(self, broken: Broken) -> None:
        """Before the next try.

        Raises:
            UserError: Nothing has come for too long.
        """
        left = self._since + self._patience_s - time.monotonic()
        if left <= 0:
            raise UserError(f"{self._source.address}: {broken}; the same command again resumes") from None
        print(f"{self._source.address}: {broken}; trying again", file=sys.stderr)
        # Not all sites at once when the server comes back.
        time.sleep(min(left, self._pause_s * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)


def fetch(source: Source, folder: Path, query: Query, patience_s: float) -> Fetched:
    """Fill the folder, or resume it.

    Args:
        source: The service.
        folder: New, empty, or of the same query.
        query: What to fetch.
        patience_s: How long to try again while nothing comes.

    Raises:
        UserError: The service refuses, sends what cannot be trusted, or is not reached; the folder is another's or
            the disk too small.
    """
    with connected(source) as stub:
        patience = _Patience(source, patience_s)
        described = _again(
            lambda: stub.Describe(DescribeRequest(selection=query.selection), timeout=CALL_S), source, patience
        )
        study = clean(described.study)
        total = _total(described, query, source)
        request = {
            "study": study,
            "release_sha256": "" if query.num_on_demand else clean(described.release_sha256),
            "generator_sha256": clean(described.generator_sha256) if query.num_on_demand else "",
            "vendors": list(query.vendors),
            "ef": list(query.ef) if query.ef else None,
            "num_on_demand": query.num_on_demand,
            "seed": query.seed,
        }
        with ReceivedCases(folder, request) as received:
            if not received.done:
                _check_disk(folder, described, query)
                if received.count:
                    print(f"resuming after {received.count} of {total} cases", file=sys.stderr)
                cases = _all_cases(stub, source, patience, received, described, query, total)
                for _ in track(cases, "fetching cases", total - received.count):
                    pass
                received.finish(_datasheet(described, query, total))
    return Fetched(total, study, clean(described.privacy))


def _again(call: Callable[[], Answer], source: Source, patience: _Patience) -> Answer:
    """A call's answer, tried until it comes."""
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            trouble = trouble_of(error, source)
            if isinstance(trouble, UserError):
                raise trouble from None
            patience.wait(trouble)


def _total(described: Description, query: Query, source: Source) -> int:
    """How many cases are to come.

    Raises:
        UserError: None, or the service cannot give them.
    """
    if described.protocol != PROTOCOL:
        raise UserError(
            f"{source.address} speaks version {described.protocol} of the delivery protocol, this is "
            f"{PROTOCOL}: install the study's version of fedcmr"
        )
    if query.num_on_demand:
        if not described.max_on_demand:
            raise UserError(f"{source.address} makes no cases on demand: leave --on-demand out")
        if query.num_on_demand > described.max_on_demand:
            raise UserError(
                f"{source.address} makes at most {described.max_on_demand} cases at once: give --on-demand less, "
                "and another --seed and folder for more"
            )
        return query.num_on_demand
    if not described.matching_cases:
        there = ", ".join(f"{entry.cases} {clean(entry.vendor)}" for entry in described.vendors)
        raise UserError(
            f"nothing matches {query.described() or 'the request'}: the set has {there}; widen --vendor or --ef"
        )
    if described.matching_cases > MAX_CASES:
        raise UserError(f"{source.address} describes more than {MAX_CASES} cases: tell the coordinator")
    return int(described.matching_cases)


def _check_disk(folder: Path, described: Description, query: Query) -> None:
    """Before the first case rather than at the last one."""
    needed = SLACK_BYTES + (0 if query.num_on_demand else described.matching_bytes)
    there = sum(path.stat().st_size for path in (folder / "cases").iterdir())
    if shutil.disk_usage(folder).free < needed - there:
        raise UserError(
            f"{folder}: expected {(needed - there) / 2**20:.0f} MiB free for the cases, got "
            f"{shutil.disk_usage(folder).free / 2**20:.0f}"
        )


def _all_cases(
    stub: DeliveryStub,
    source: Source,
    patience: _Patience,
    received: ReceivedCases,
    described: Description,
    query: Query,
    total: int,
) -> Iterator[None]:
    """Yields once for every case that is kept, over as many streams as it takes."""
    while received.count < total:
        stream = _stream(stub, received, described, query, total)
        try:
            for header, info, content in _whole_cases(stream, query, received):
                expect(received.count < total, "more cases than it described")
                check_file(header, info, content)
                received.keep(info, content, header.sha256)
                patience.progress()
                yield
            expect(received.count == total, "fewer cases than it described")
        except Untrustworthy as error:
            raise UserError(
                f"{source.address} sent {error}: it was not kept, nor anything after it; tell the coordinator"
            ) from None
        except grpc.RpcError as error:
            trouble = trouble_of(error, source)
            if isinstance(trouble, UserError):
                raise trouble from None
            patience.wait(trouble)
        finally:
            stream.cancel()


def _stream(
    stub: DeliveryStub, received: ReceivedCases, described: Description, query: Query, total: int
) -> "grpc.CallIterator[Chunk]":
    """The cases after the last one that is there."""
    if query.num_on_demand:
        request = SampleRequest(
            generator_sha256=described.generator_sha256,
            selection=query.selection,
            seed=query.seed,
            count=total - received.count,
            after=received.last,
        )
        return stub.Sample(request, timeout=STREAM_S)
    return stub.Stream(
        StreamRequest(release_sha256=described.release_sha256, selection=query.selection, after=received.last),
        timeout=STREAM_S,
    )


def _whole_cases(
    stream: "grpc.CallIterator[Chunk]", query: Query, received: ReceivedCases
) -> Iterator[tuple[CaseHeader, CaseInfo, bytes]]:
    """Headers, rows and files put together from the pieces; never more than one case is in memory.

    Raises:
        Untrustworthy: The pieces are not those of cases, or the stream ends within one.
    """
    header: CaseHeader | None = None
    content = bytearray()
    for chunk in stream:
        if chunk.WhichOneof("part") == "header":
            expect(header is None, "a case before the end of the one before")
            header, content = chunk.header, bytearray()
            info = announced(header, query.selection, received.last)  # before a byte of it is taken
            continue
        if header is None or not chunk.data:
            raise Untrustworthy("pieces of no case")
        expect(len(content) + len(chunk.data) <= header.size, "more bytes than it announced")
        content += chunk.data
        if len(content) == header.size:
            yield header, info, bytes(content)
            header = None
    expect(header is None, "a case that ends too early")


def _datasheet(described: Description, query: Query, total: int) -> str:
    """The set's own, word for word where the folder is the whole set, else below a note of what the folder is."""
    text = "".join(c for c in described.datasheet if c.isprintable() or c in "\n\t")
    if query.num_on_demand:
        selection = f" ({query.described()})" if query.described() else ""
        note = (
            f"> This folder holds {total} cases{selection} made on demand, sampled with seed {query.seed} from the "
            f"generator (SHA-256 {clean(described.generator_sha256)}) of the set that is described below. None of "
            "them is in that set, and its numbers are not theirs; the paragraphs on how they were made, privacy, uses "
            "and terms hold for both."
        )
    elif query.described():
        number = sum(entry.cases for entry in described.vendors)
        note = (
            f"> This folder holds {total} of the {number} cases of the set described below: {query.described()}. "
            "The numbers below are those of the whole set."
        )
    else:
        return text
    return f"{note}\n\n{_without_front_matter(text)}"


def _without_front_matter(text: str) -> str:
    """A card without the YAML at its head, which would no longer stand there and tells of the whole set."""
    _, end, rest = text.partition("\n---\n")
    return rest.lstrip("\n") if text.startswith("---\n") and end else text


def check_ef(low: float, high: float) -> tuple[float, float]:
    """A range of ejection fractions.

    Raises:
        UserError: It is none.
    """
    if not (math.isfinite(low + high) and 0 <= low <= high <= 1):
        raise UserError(f"Expected --ef LOW HIGH as fractions, 0 <= LOW <= HIGH <= 1, got {low:g} {high:g}.")
    return low, high
