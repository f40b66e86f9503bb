"""What can go wrong with one request, each fault an aiohttp middleware that `Faults` puts in.

"Applied" is the control plane's side of it: the operation was carried out although the client was
told nothing, or something else.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import orjson
from aiohttp import web

from workpool.server.errors import Refusal
from workpool.testing.changes import Changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server import ControlPlane
    from workpool.testing.faults import Fault

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LINGER_NONE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, for 0 seconds: closing sends a reset."""
_HTML: Final = b"<html><body><h1>Bad gateway</h1></body></html>"


def status(
    code: int, *, retry_after: str | float | None = None, html: bool = False, applied: bool = False
) -> Fault:
    """Answer with a status, in the protocol's envelope or, as gateways do, in HTML."""
    body = _HTML if html else orjson.dumps(Refusal(code, "injected").envelope())
    headers = {"Content-Type": "text/html" if html else "application/json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return literal(body, code, headers=headers, applied=applied)


def garbled(*, applied: bool = True) -> Fault:
    """Answer 200 with what is not JSON."""
    return literal(b'{"id": "work_', applied=applied)


def literal(
    body: bytes | Callable[[], bytes],
    code: int = 200,
    *,
    headers: dict[str, str] | None = None,
    applied: bool = False,
) -> Fault:
    """Answer with this and nothing else; `body` may be a function that makes it."""

    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if applied:
            await handler(request)
        content = body() if callable(body) else body
        return web.Response(
            body=content, status=code, headers=headers or {"Content-Type": "application/json"}
        )

    return answer


def delay(seconds: float, *, applied: bool = False) -> Fault:
    """Wait before the operation; `applied`: after it, before the answer."""

    async def wait(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not applied:
            await asyncio.sleep(seconds)
            return await handler(request)
        response = await handler(request)
        await asyncio.sleep(seconds)
        return response

    return wait


def lost(*, applied: bool = True) -> Fault:
    """Close the connection instead of answering."""
    return _hang_up(_close, applied=applied)


def reset(*, applied: bool = True) -> Fault:
    """Reset the connection instead of answering."""
    return _hang_up(reset_connection, applied=applied)


def trickle(seconds: float) -> Fault:
    """Answer byte by byte, `seconds` apart."""

    async def drip(request: web.Request, handler: Handler) -> web.StreamResponse:
        whole = await handler(request)
        body = whole.body if isinstance(whole, web.Response) else None
        content = body if isinstance(body, bytes) else b""
        response = web.StreamResponse(status=whole.status)
        response.content_type = whole.content_type
        response.content_length = len(content)
        with suppress(ConnectionError):  # the client has lost its patience
            await response.prepare(request)
            for byte in content:
                await response.write(bytes((byte,)))
                await asyncio.sleep(seconds)
        return response

    return drip


def expired(plane: ControlPlane) -> Fault:
    """End the item's lease before the operation; a request without an item goes through."""

    async def expire(request: web.Request, handler: Handler) -> web.StreamResponse:
        work_id = request.match_info.get("work_id")
        if work_id is not None:
            expire_lease(plane, work_id, request.match_info["environment_id"])
        return await handler(request)

    return expire


def expire_lease(plane: ControlPlane, work_id: str, environment_id: str | None = None) -> None:
    """End an item's lease now, as if its time had passed; without one, nothing happens."""
    queue = plane.operations.queue(environment_id or plane.environments[0])
    item = queue.get(work_id)
    if item.lease_end is not None:
        # "Now" is the control plane's own last instant: history never goes back.
        queue.put(replace(item, lease_end=min(item.lease_end, plane.operations.latest)))
        plane.operations.queue(queue.environment_id)


class Hold:
    """A fault that holds requests until `release()`, before the operation or after it."""

    def __init__(self, *, applied: bool = False) -> None:
        self.held = 0
        self._applied = applied
        self._released = asyncio.Event()
        self._changes = Changes()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Hold one request."""
        if self._applied:
            response = await handler(request)
            await self._wait()
            return response
        await self._wait()
        return await handler(request)

    async def _wait(self) -> None:
        self.held += 1
        self._changes.notify()
        await self._released.wait()

    async def reached(self, count: int = 1) -> None:
        """Wait until `count` requests have come so far."""
        await self._changes.until(
            lambda: self.held >= count, lambda: f"{count} requests to hold; held {self.held}"
        )

    def release(self) -> None:
        """Let them go on, those to come as well."""
        self._released.set()


class Cut:
    """A fault that lets requests through and can end their connections later: event streams."""

    def __init__(self) -> None:
        self._open: set[asyncio.WriteTransport] = set()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let one request through."""
        transport = request.transport
        if transport is None:
            return await handler(request)
        self._open.add(transport)
        try:
            return await handler(request)
        finally:
            self._open.discard(transport)

    def now(self) -> int:
        """Reset all connections whose requests are still being answered; return how many."""
        cut = list(self._open)
        for transport in cut:
            reset_connection(transport)
        return len(cut)


def _hang_up(close: Callable[[asyncio.Transport], None], *, applied: bool) -> Fault:
    async def hang_up(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request) if applied else web.Response()
        if request.transport is not None:
            close(request.transport)
        return response  # to a closed connection: it goes nowhere

    return hang_up


def _close(transport: asyncio.Transport) -> None:
    transport.close()


def reset_connection(transport: asyncio.WriteTransport) -> None:
    """Close a connection with a reset, and without what it had still to send."""
    connection = transport.get_extra_info("socket")
    with suppress(OSError):  # it has ended by itself just now
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    transport.abort()
