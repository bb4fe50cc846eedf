"""Access control of every call: who calls, how many calls at once, and a line in the audit log for each.

Every method but the health check needs a token, also one that is added later. The one message of a request is read
here, within the caller's share of calls and within seconds: a caller that opens calls and stays silent uses up only its
own share for that time.

Behind the gateway every caller has the gateway's address. The gateway states the address of the caller. This is
trusted because it calls from this machine; the same metadata from any other address is ignored.
"""

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

from fedcmr.server.delivery.access_log import AuditLog
from fedcmr.server.delivery.query import Refusal, checked, described
from fedcmr.server.delivery.tokens import TokenBook
from fedcmr.shared.delivery.contract import AUTHORIZATION, BEARER, SERVICE

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
CALLS_PER_SITE, CALLS_IN_ALL = 4, 16
"""Concurrent calls: of one site, silent ones included, and of all sites together while they are served."""
CHECKS_PER_ADDRESS, CHECKS_IN_ALL = 2, 32
"""Concurrent health checks, of one address and in all; they need no token."""
WAITING_IN_ALL = 32
"""Concurrent calls of all sites that have not sent their request yet."""
FIRST_MESSAGE_S = 2.0
"""Seconds within which a caller must send its request, which comes with the call or with the next packet."""
FORWARDED_FOR = "x-forwarded-for"
CHECKING, WAITING, ANSWERED = "health check", "waiting", "answered"

Method = Callable[[Any, grpc.ServicerContext], Any]


class TokenInterceptor(grpc.ServerInterceptor):
    """Lets calls with a site's token in."""

    def __init__(self, tokens: TokenBook, audit: AuditLog):
        self._tokens, self._audit = tokens, audit
        self._calls: Counter[tuple[str, str]] = Counter()  # (kind, caller); for each kind, "" is all callers together
        self._lock = threading.Lock()

    def intercept_service(
        self, continuation: Callable[[Any], grpc.RpcMethodHandler | None], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """The method's handler behind this check, or one that refuses before it reads anything."""
        handler = continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        forwarded = _forwarded_for(details)
        if method == HEALTH_CHECK:
            return _reading(handler, self._anonymous(handler.unary_unary, forwarded))
        if not method.startswith(f"/{SERVICE}/"):  # Health/Watch would hold a thread for any caller
            return None
        token = _token(details)
        site = self._tokens.site_of(token)
        if site is None:
            return grpc.stream_unary_rpc_method_handler(self._refusing(method, forwarded))
        inner = handler.unary_stream or handler.unary_unary
        assert inner is not None, "no method of ours takes a stream"
        call = _Call(method, site, token, bool(handler.response_streaming), forwarded)
        return _reading(handler, self._answering(inner, call))

    def _refusing(self, method: str, forwarded: str) -> Method:
        def refuse(requests: Iterator[Any], context: grpc.ServicerContext) -> None:
            self._audit.refused(context.peer(), client_of(context.peer(), forwarded), method)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "expected a token of this study, got none or another")

        return refuse

    def _anonymous(self, inner: Method, forwarded: str) -> Method:
        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            client = client_of(context.peer(), forwarded)
            # Programs on this machine share its address; their connections distinguish them.
            whose = context.peer() if _is_loopback(client) else client
            try:
                with self._share(CHECKING, whose, CHECKS_PER_ADDRESS, CHECKS_IN_ALL):
                    yield inner(_only(requests, context), context)
            except Refusal as refusal:
                context.abort(refusal.code, refusal.text)

        return answer

    def _answering(self, inner: Method, call: "_Call") -> Method:
        site = call.site

        def answer(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            client = client_of(context.peer(), call.forwarded)
            facts: dict[str, object] = {"site": site, "peer": context.peer(), "client": client, "method": call.method}
            started, num_cases, num_bytes = time.monotonic(), 0, 0
            code = "CANCELLED"
            try:
                with self._share(WAITING, site, CALLS_PER_SITE, WAITING_IN_ALL):
                    request = _only(requests, context)
                with self._share(ANSWERED, site, CALLS_PER_SITE, CALLS_IN_ALL):
                    facts["selection"] = described(checked(request.selection))
                    for message in inner(request, context) if call.streaming else (inner(request, context),):
                        if call.streaming and message.HasField("header"):
                            # A token may be revoked while its stream runs.
                            if self._tokens.site_of(call.token) != site:
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
                self._audit.call(
                    **facts, cases=num_cases, bytes=num_bytes, code=code, elapsed_s=round(time.monotonic() - started, 2)
                )

        return answer

    @contextmanager
    def _share(self, kind: str, whose: str, most: int, most_in_all: int) -> Iterator[None]:
        """Count one more concurrent call of a kind while the body runs.

        Raises:
            Refusal: The limit is reached, for this caller or for all.
        """
        with self._lock:
            if self._calls[kind, whose] >= most or self._calls[kind, ""] >= most_in_all:
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once: try again later")
            self._calls.update([(kind, whose), (kind, "")])
        try:
            yield
        finally:
            with self._lock:
                self._calls.subtract([(kind, whose), (kind, "")])
                if not self._calls[kind, whose]:
                    del self._calls[kind, whose]


@dataclass(frozen=True)
class _Call:
    """What is known of a site's call before it is served."""

    method: str
    site: str
    token: str
    streaming: bool
    forwarded: str


def client_of(peer: str, forwarded: str) -> str:
    """Address of the caller: the one that the gateway states, or that of a connection that is not the gateway's.

    Args:
        peer: The other end of the connection as gRPC spells it, such as "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000".
        forwarded: The address in the call's metadata; empty where there is none.
    """
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    if forwarded and _is_loopback(host):
        try:
            return str(ipaddress.ip_address(forwarded))
        except ValueError:  # not what the gateway writes
            return host
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _forwarded_for(details: grpc.HandlerCallDetails) -> str:
    """The origin in a call's metadata; empty where there is none, or more than one."""
    found = [value for key, value in details.invocation_metadata or () if key == FORWARDED_FOR]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def _token(details: grpc.HandlerCallDetails) -> str:
    """The token in a call's metadata; empty where there is none."""
    for key, value in details.invocation_metadata or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.startswith(BEARER):
            return value.removeprefix(BEARER)
    return ""


def _reading(handler: grpc.RpcMethodHandler, answer: Method) -> grpc.RpcMethodHandler:
    """A handler that gets its request as an iterator: the same on the wire, but no thread waits for it beforehand."""
    return grpc.stream_stream_rpc_method_handler(
        answer, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


def _only(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
    """The request's one message.

    Raises:
        Refusal: There is none, or it does not come in time.
    """
    late = threading.Timer(FIRST_MESSAGE_S, context.cancel)
    late.daemon = True
    late.start()
    try:
        for request in requests:
            return request
    except grpc.RpcError:  # cancelled, here or by the caller
        raise Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "expected a message with the call") from None
    finally:
        late.cancel()
    raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "expected a message")
