"""Injection of faults into HTTP requests to a control plane, and into their connections.

`answer_with_fault` applies a `Fault` to a request. `Hold` and `Cut` exist over HTTP only: a test
calls their methods while a request is in progress. See workpool/docs/testing.md, "Faults and
failing networks".
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args

from aiohttp import web

from workpool.server.http.server_dialects import WORKER_ID_HEADERS
from workpool.testing.bounded_wait import BoundedCondition
from workpool.testing.fault import Fault, Op
from workpool.wire.response import Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LINGER_NONE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with 0 seconds: closing the socket sends a reset."""
_SUFFIXED: Final = frozenset({"poll", "stats", "ack", "heartbeat", "stop"})


class FaultMiddleware(Protocol):
    """The interface of a fault with an effect that `Fault` does not have; `Hold` is an example."""

    def __call__(self, request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
        """Answer the request. `handler(request)` returns the answer without this fault."""


async def answer_with_fault(
    fault: Fault | FaultMiddleware, request: web.Request, handler: Handler
) -> web.StreamResponse:
    """Answer a request with the effects of a fault; `handler` returns the answer without them."""
    if not isinstance(fault, Fault):
        return await fault(request, handler)
    if seconds := fault.wait + fault.request_delay:
        await asyncio.sleep(seconds)
    if fault.before is not None:
        fault.before(
            request.match_info.get("environment_id", ""), request.match_info.get("work_id")
        )
    true = await handler(request) if fault.applied else web.Response()
    if fault.answer_delay:
        await asyncio.sleep(fault.answer_delay)
    if fault.answer is not None or fault.rewrite is not None:
        return await _replace_answer(fault, request, true)
    return _BytewiseResponse(true, fault.byte_seconds) if fault.byte_seconds else true


async def _replace_answer(
    fault: Fault, request: web.Request, true: web.StreamResponse
) -> web.StreamResponse:
    """Answer with the fault's answer in place of the control plane's answer.

    The argument `true` is the control plane's answer.
    """
    headers = {
        name: value for name, value in true.headers.items() if name.lower() != "content-length"
    }
    answer = fault.replace_answer(Response(true.status, headers, _encode_body(true)))
    if answer == "silence":
        # aiohttp cancels this handler when the client closes the connection.
        await asyncio.Event().wait()
    if isinstance(answer, str):
        if request.transport is not None:
            _close_connection(request.transport, answer)
        # An aiohttp handler must return an answer. aiohttp does not send this answer, because the
        # connection is closed.
        return true
    body = answer.body if isinstance(answer.body, bytes) else b""
    replaced = web.Response(body=body, status=answer.status, headers=answer.headers)
    return _BytewiseResponse(replaced, fault.byte_seconds) if fault.byte_seconds else replaced


def _encode_body(response: web.StreamResponse) -> bytes:
    body = response.body if isinstance(response, web.Response) else None
    return body if isinstance(body, bytes) else b""


def _close_connection(transport: asyncio.Transport, how: str) -> None:
    if how == "reset":
        reset_connection(transport)
    else:
        transport.close()


class _BytewiseResponse(web.Response):
    """An answer that is sent byte by byte, with `seconds` between two bytes.

    It is sent when all faults of the request have had their effect: a fault that sent its own
    answer earlier would leave a second answer on the connection, and the client would take it for
    the answer to its next request.
    """

    def __init__(self, whole: web.StreamResponse, seconds: float) -> None:
        super().__init__(
            status=whole.status, body=_encode_body(whole), content_type=whole.content_type
        )
        self._seconds = seconds

    async def write_eof(self, data: bytes = b"") -> None:
        # A write fails if the client closes the connection before the last byte.
        with suppress(ConnectionError):
            for byte in _encode_body(self):
                await self.write(bytes((byte,)))
                await asyncio.sleep(self._seconds)
            await web.StreamResponse.write_eof(self, data)


def find_operation_of_request(request: web.Request) -> Op | None:
    """Return the operation of a worker's request; None for a request of an application."""
    match = request.match_info
    tail = request.path.rpartition("/")[2]
    op: Any
    if "session_id" in match:
        listed = "events" if request.method == "GET" else "send"
        op = {"events": listed, "stream": "stream", "archive": None}.get(tail, "session")
    elif tail == match.get("environment_id", tail):
        op = None
    elif tail in _SUFFIXED:
        op = tail
    elif "work_id" in match:
        op = "get" if request.method == "GET" else "update"
    else:
        op = "list" if request.method == "GET" else "enqueue"
    return op if op in get_args(Op) else None


def find_worker_id_of_request(request: web.Request) -> str | None:
    """Return the worker's name from the header of a request."""
    return next(filter(None, map(request.headers.get, WORKER_ID_HEADERS)), None)


class Hold:
    """A fault that delays requests until the test calls `release()`.

    With `applied`, requests are carried out at once and only their answers are delayed.

    Attributes:
        held: The number of requests that have reached the delay.
    """

    def __init__(self, *, applied: bool = False) -> None:
        self.held = 0
        self._applied = applied
        self._released = asyncio.Event()
        self._changes = BoundedCondition()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Delay one request, or the answer to it, until the test calls `release()`."""
        if self._applied:
            response = await handler(request)
            await self._hold_until_release()
            return response
        await self._hold_until_release()
        return await handler(request)

    async def _hold_until_release(self) -> None:
        self.held += 1
        self._changes.notify_all()
        await self._released.wait()

    async def reached(self, count: int = 1) -> None:
        """Wait until `count` requests in total have been held."""
        await self._changes.wait_until(
            lambda: self.held >= count, lambda: f"{count} requests to hold; held {self.held}"
        )

    def release(self) -> None:
        """Let all held requests continue, and delay no later request."""
        self._released.set()


class Cut:
    """A fault that lets a test break the connections of requests, such as event streams."""

    def __init__(self) -> None:
        self._open: set[asyncio.WriteTransport] = set()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer one request. Meanwhile, a call of `now()` resets the connection."""
        transport = request.transport
        if transport is None:
            return await handler(request)
        self._open.add(transport)
        try:
            return await handler(request)
        finally:
            self._open.discard(transport)

    def now(self) -> int:
        """Reset every connection whose answer is unfinished; return the number of connections."""
        cut = list(self._open)
        for transport in cut:
            reset_connection(transport)
        return len(cut)


def reset_connection(transport: asyncio.WriteTransport) -> None:
    """Reset a TCP connection, and drop the bytes that have not been sent."""
    connection = transport.get_extra_info("socket")
    # `setsockopt` fails if the connection has already ended.
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    transport.abort()
