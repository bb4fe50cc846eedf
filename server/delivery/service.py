"""The methods of the service: what is available, the released cases, on-demand cases."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import grpc

from fedcmr.server.delivery.on_demand import OnDemandSampler
from fedcmr.server.delivery.query import Refusal, bad_request
from fedcmr.server.delivery.released_set import ReleasedSet
from fedcmr.shared.case import CaseInfo, write_arrays
from fedcmr.shared.delivery.contract import CHUNK_BYTES, PROTOCOL, to_row
from fedcmr.shared.delivery.delivery_pb2 import (
    CaseHeader,
    Chunk,
    DescribeRequest,
    Description,
    SampleRequest,
    StreamRequest,
    VendorCount,
)
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryServicer


@dataclass(frozen=True)
class Offer:
    """What is delivered.

    Attributes:
        study: Name of the study.
        privacy: One sentence on the guarantee.
        released: The released set.
        sampler: Sampler of on-demand cases; None where there are none.
        max_on_demand: Largest number of on-demand cases per call.
    """

    study: str
    privacy: str
    released: ReleasedSet
    sampler: OnDemandSampler | None
    max_on_demand: int


class Delivery(DeliveryServicer):  # type: ignore[misc]
    """The service of `delivery.proto`; `TokenInterceptor` has authenticated the caller and checked the selection."""

    def __init__(self, offer: Offer):
        self._offer = offer

    def Describe(self, request: DescribeRequest, context: grpc.ServicerContext) -> Description:  # noqa: N802
        """What is available, and what the selection matches."""
        offer, sampler = self._offer, self._offer.sampler
        matching = list(offer.released.select(request.selection))
        return Description(
            protocol=PROTOCOL,
            study=offer.study,
            release_sha256=offer.released.sha256,
            vendors=[VendorCount(vendor=name, cases=number) for name, number in offer.released.per_vendor().items()],
            datasheet=offer.released.datasheet,
            privacy=offer.privacy,
            matching_cases=len(matching),
            matching_bytes=sum(entry.size for entry in matching),
            max_on_demand=offer.max_on_demand if sampler else 0,
            generator_sha256=sampler.generator_sha256 if sampler else "",
        )

    def Stream(self, request: StreamRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:  # noqa: N802
        """The matching cases of the released set after `after`."""
        released = self._offer.released
        if request.release_sha256 != released.sha256:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "this release is no longer served: there is a new one")
        for entry in released.select(request.selection, request.after):
            yield from _chunks(entry.info, released.read(entry), entry.sha256)

    def Sample(self, request: SampleRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:  # noqa: N802
        """The requested number of on-demand cases after `after`."""
        sampler = self._offer.sampler
        if sampler is None:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no cases are made on demand here")
        if request.generator_sha256 != sampler.generator_sha256:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "this generator is no longer served: there is a new one")
        if not 1 <= request.count <= self._offer.max_on_demand:
            raise bad_request(f"expected 1 to {self._offer.max_on_demand} cases")
        query = sampler.query(request.selection, request.seed)
        for case in islice(sampler.cases(query, request.after), request.count):
            content = io.BytesIO()
            write_arrays(content, case)
            data = content.getvalue()
            yield from _chunks(case.info, data, hashlib.sha256(data).hexdigest())


def _chunks(info: CaseInfo, content: bytes, sha256: str) -> Iterator[Chunk]:
    """A case's header, then its file in pieces."""
    yield Chunk(header=CaseHeader(row=to_row(info), size=len(content), sha256=sha256))
    for start in range(0, len(content), CHUNK_BYTES):
        yield Chunk(data=content[start : start + CHUNK_BYTES])
