"""The faults of single requests. Each is an aiohttp middleware for `Faults`.

A fault with `applied` carries out the operation, although the client gets another answer or none.
See workpool/docs/testing.md, "Faults and failing networks".
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

from workpool.server.api_errors import APIError
from workpool.testing.changes import Changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server import ControlPlane
    from workpool.testing.faults import Fault

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LINGER_NONE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with 0 seconds: closing the socket sends a reset."""
_HTML: Final = b"<html><body><h1>Bad gateway</h1></body></html>"


def status(
    code: int, *, retry_after: str | float | None = None, html: bool = False, applied: bool = False
) -> Fault:
    """Answer with a status: an error of the protocol or, like a gateway, an HTML page."""
    body = _HTML if html else orjson.dumps(APIError(code, "injected").envelope())
    headers = {"Content-Type": "text/html" if html else "application/json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return literal(body, code, headers=headers, applied=applied)


def garbled(*, applied: bool = True) -> Fault:
    """Answer 200 with a body that is not JSON."""
    return literal(b'{"id": "work_', applied=applied)


def literal(
    body: bytes | Callable[[], bytes],
    code: int = 200,
    *,
    headers: dict[str, str] | None = None,
    applied: bool = False,
) -> Fault:
    """Answer with this body; `body` may be a function that returns it."""

    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if applied:
            await handler(request)
        content = body() if callable(body) else body
        return web.Response(
            body=content, status=code, headers=headers or {"Content-Type": "application/json"}
        )

    return answer


def delay(seconds: float, *, applied: bool = False) -> Fault:
    """Wait before the operation, or with `applied` between the operation and the answer."""

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
    """Send the answer byte by byte, with `seconds` between two bytes."""

    async def drip(request: web.Request, handler: Handler) -> web.StreamResponse:
        whole = await handler(request)
        body = whole.body if isinstance(whole, web.Response) else None
        content = body if isinstance(body, bytes) else b""
        response = web.StreamResponse(status=whole.status)
        response.content_type = whole.content_type
        response.content_length = len(content)
        with suppress(ConnectionError):  # the client closed the connection
            await response.prepare(request)
            for byte in content:
                await response.write(bytes((byte,)))
                await asyncio.sleep(seconds)
        return response

    return drip


def expired(plane: ControlPlane) -> Fault:
    """End the lease of the item before the operation. A request without an item is unchanged."""

    async def expire(request: web.Request, handler: Handler) -> web.StreamResponse:
        work_id = request.match_info.get("work_id")
        if work_id is not None:
            expire_lease(plane, work_id, request.match_info["environment_id"])
        return await handler(request)

    return expire


def expire_lease(plane: ControlPlane, work_id: str, environment_id: str | None = None) -> None:
    """End the lease of an item now, as if its time had passed. No effect without a lease."""
    queue = plane.operations.queue(environment_id or plane.environments[0])
    item = queue.get(work_id)
    if item.lease_end is not None:
        # "Now" is the last time that the control plane recorded: its history never goes back.
        queue.put(replace(item, lease_end=min(item.lease_end, plane.operations.latest)))
        plane.operations.queue(queue.environment_id)


class Hold:
    """A fault that delays requests until `release()`, before the operation or after it."""

    def __init__(self, *, applied: bool = False) -> None:
        self.held = 0
        self._applied = applied
        self._released = asyncio.Event()
        self._changes = Changes()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Delay one request."""
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
        """Wait until `count` requests have arrived in total."""
        await self._changes.until(
            lambda: self.held >= count, lambda: f"{count} requests to hold; held {self.held}"
        )

    def release(self) -> None:
        """Continue all delayed requests, and do not delay further ones."""
        self._released.set()


class Cut:
    """A fault that can break the connections of requests later, such as event streams."""

    def __init__(self) -> None:
        self._open: set[asyncio.WriteTransport] = set()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Handle one request, whose connection `now()` can break."""
        transport = request.transport
        if transport is None:
            return await handler(request)
        self._open.add(transport)
        try:
            return await handler(request)
        finally:
            self._open.discard(transport)

    def now(self) -> int:
        """Reset all connections with an unfinished answer; return their number."""
        cut = list(self._open)
        for transport in cut:
            reset_connection(transport)
        return len(cut)


def _hang_up(close: Callable[[asyncio.Transport], None], *, applied: bool) -> Fault:
    async def hang_up(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request) if applied else web.Response()
        if request.transport is not None:
            close(request.transport)
        return response  # the connection is closed, so the answer is dropped

    return hang_up


def _close(transport: asyncio.Transport) -> None:
    transport.close()


def reset_connection(transport: asyncio.WriteTransport) -> None:
    """Close a connection with a reset, and drop the bytes that are not sent yet."""
    connection = transport.get_extra_info("socket")
    with suppress(OSError):  # the connection ended just before
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    transport.abort()
