"""The one door of the service: who asks, how many calls at once, and a line in the audit log for each.

Every method but the health check needs a token, also one that is added later. The one message of a request is read
here, inside the caller's share of calls: whoever opens calls and stays silent uses up that share and nobody else's.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from server.delivery.audit import AuditLog
from server.delivery.selection import Refusal, checked, words
from server.delivery.tokens import TokenBook
from shared.delivery.contract import AUTHORIZATION, BEARER, SERVICE

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
CALLS_PER_SITE, CALLS_IN_ALL = 4, 16
ANONYMOUS = ""
"""Stands in a site's place for health checks; they have a share of their own."""

Method = Callable[[Any, grpc.ServicerContext], Any]


class Guard(grpc.ServerInterceptor):
    """Lets calls with a site's token in."""

    def __init__(self, tokens: TokenBook, audit: AuditLog):
        self._tokens, self._audit = tokens, audit
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def intercept_service(
        self, continuation: Callable[[Any], grpc.RpcMethodHandler | None], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The method's own handler with the guard around it, or one that refuses before it reads anything."""
        handler = continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        if method == HEALTH_CHECK:
            return _reading(handler, self._anonymous(handler.unary_unary))
        if not method.startswith(f"/{SERVICE}/"):  # Health/Watch would hold a thread for whoever asks
            return None
        token = _token(details)
        site = self._tokens.site_of(token)
        if site is None:
            return grpc.stream_unary_rpc_method_handler(self._refusing(method))
        inner = handler.unary_stream or handler.unary_unary
        assert inner is not None, "no method of ours takes a stream"
        return _reading(handler, self._guarded(inner, method, site, token, bool(handler.response_streaming)))

    def _refusing(self, method: str) -> Method:
        def refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> None:
            self._audit.refused(context.peer(), method)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "expected a token of this study, got none or another")

        return refuse

    def _anonymous(self, inner: Method) -> Method:
        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with self._share(ANONYMOUS):
                    yield inner(_only(requests), context)
            except Refusal as refusal:
                context.abort(refusal.code, refusal.text)

        return answer

    def _guarded(self, inner: Method, method: str, site: str, token: str, streaming: bool) -> Method:
        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            facts: dict[str, object] = {"site": site, "peer": context.peer(), "method": method}
            started, num_cases, num_bytes = time.monotonic(), 0, 0
            code = "CANCELLED"
            try:
                with self._share(site):
                    request = _only(requests)
                    facts["selection"] = words(checked(request.selection))
                    for message in inner(request, context) if streaming else (inner(request, context),):
                        if streaming and message.HasField("header"):
                            # A token may be taken away while its stream runs.
                            if self._tokens.site_of(token) != site:
                                raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "this token was revoked")
                            num_cases += 1
                        num_bytes += message.ByteSize()
                        yield message
                code = "OK"
            except Refusal as refusal:
                code = refusal.code.name
                context.abort(refusal.code, refusal.text)
            except Exception:
                code = "INTERNAL"
                raise
            finally:
                self._audit.call(**facts, cases=num_cases, bytes=num_bytes, code=code,
                                 elapsed_s=round(time.monotonic() - started, 2))  # fmt: skip

        return answer

    @contextmanager
    def _share(self, site: str) -> Iterator[None]:
        """One of the calls that a site may have running.

        Raises:
            Refusal: It has as many as it may, or all sites together do.
        """
        with self._lock:
            in_all = self._calls.total() - self._calls[ANONYMOUS]
            if self._calls[site] >= CALLS_PER_SITE or (site != ANONYMOUS and in_all >= CALLS_IN_ALL):
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once: try again later")
            self._calls[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[site] -= 1


def _token(details: grpc.HandlerCallDetails) -> str:
    """What a call's metadata gives as its token; empty where nothing does."""
    for key, value in details.invocation_metadata or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.startswith(BEARER):
            return value.removeprefix(BEARER)
    return ""


def _reading(handler: grpc.RpcMethodHandler, answer: Method) -> grpc.RpcMethodHandler:
    """A handler that gets its request as an iterator: on the wire it is the same, and no thread waits for it before."""
    return grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


def _only(requests: Iterator[Any]) -> Any:
    """The request's one message.

    Raises:
        Refusal: There is none.
    """
    for request in requests:
        return request
    raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "expected a message")
