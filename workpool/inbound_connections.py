"""Limits on the connections that clients open to an HTTP server of this package.

aiohttp limits neither the number of connections of a server, nor the time that a client takes to
send the headers of a request or to read an answer, nor the bytes that wait for clients that do not
read. Without each of these limits, one client could use up the descriptors or the memory of the
process.
"""

from __future__ import annotations

import asyncio
import logging
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADER_SECONDS: Final = 10.0
"""Time from the first byte of a request, or from the connection, to the end of its headers."""

IDLE_SECONDS: Final = 75.0
"""Time that a connection may wait for another request."""

SERVE_SECONDS: Final = 30.0
"""Time after which a request, such as an event stream, may be ended to make room for others."""

READ_SECONDS: Final = 30.0
"""Time that a client may read nothing of an answer that waits for it."""

UNREAD_BYTES_MAX: Final = 32 * 1024 * 1024
"""Bytes that may wait in total for clients to read them."""

CHECK_SECONDS: Final = 1.0
"""Interval at which the times are checked."""


class InboundConnections:
    """Limits the number and the waiting times of the connections to one HTTP server.

    If a new connection makes more than `limit`, the connection that has waited longest for a
    request is closed: a client that sends its request at once is served although others hold
    connections without a request. If all serve a request, the oldest request is ended if it is
    older than `SERVE_SECONDS`; otherwise the new connection is closed.

    If more than `UNREAD_BYTES_MAX` bytes wait for clients that do not read fast enough, the
    connection that has waited longest for its client is closed.

    Args:
        limit: Connections that may be open.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[asyncio.BaseTransport, _Connection] = {}
        # The keys of each of the next three dicts are in the order in which they were added.
        self._without_request: dict[_Connection, None] = {}
        self._serving: dict[_Connection, float] = {}
        self._unread: dict[_Connection, int] = {}
        self._unread_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._open)

    def protocol_factory(self, server: web.Server | None) -> Callable[[], asyncio.Protocol]:
        """Return the factory that `loop.create_server` calls for each connection to `server`."""
        new_protocol = cast("Callable[[], asyncio.Protocol]", server)
        return lambda: _Connection(self, new_protocol())

    @web.middleware
    async def request_tracking_middleware(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Outermost aiohttp middleware: records which connections have an open request."""
        connection = self._open.get(cast("asyncio.BaseTransport", request.transport))
        if connection is None:
            return await handler(request)
        self._without_request.pop(connection, None)
        self._serving[connection] = asyncio.get_running_loop().time()
        connection.due = None
        try:
            return await handler(request)
        finally:
            self._serving.pop(connection, None)
            if request.transport in self._open:
                self._start_request_deadline(connection, IDLE_SECONDS)

    def close_all(self) -> None:
        """Close all connections now, also those whose client does not read."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for transport in tuple(self._open):
            cast("asyncio.WriteTransport", transport).abort()

    def add_connection(self, connection: _Connection) -> bool:
        """Record a new connection. Return False if it must be closed."""
        if len(self._open) >= self._limit:
            oldest = self._find_closable_connection()
            if oldest is None:
                return False
            self._abort_connection(oldest)
        self._open[connection.transport] = connection
        self._start_request_deadline(connection, HEADER_SECONDS)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                CHECK_SECONDS, self._close_overdue_connections
            )
        return True

    def remove_connection(self, connection: _Connection) -> None:
        """Remove a connection that was closed."""
        self._open.pop(connection.transport, None)
        self._without_request.pop(connection, None)
        self._serving.pop(connection, None)
        self.remove_unread_bytes(connection)

    def add_unread_bytes(self, connection: _Connection) -> None:
        """Record that the client of this connection has not read all bytes that were sent to it."""
        self._unread[connection] = size = connection.count_unread_bytes()
        self._unread_bytes += size
        while self._unread_bytes > UNREAD_BYTES_MAX:
            self._abort_connection(next(iter(self._unread)))

    def remove_unread_bytes(self, connection: _Connection) -> None:
        """Subtract the connection's unread bytes from the total of unread bytes.

        Called when the client has read most of the bytes, and when the connection is closed.
        """
        self._unread_bytes -= self._unread.pop(connection, 0)

    def _find_closable_connection(self) -> _Connection | None:
        """Return the idle or slow connection to close to make room for a new one, or None."""
        for connection in self._without_request:
            return connection
        until = asyncio.get_running_loop().time() - SERVE_SECONDS
        for connection, since in self._serving.items():
            return connection if since <= until else None
        return None

    def _start_request_deadline(self, connection: _Connection, seconds: float) -> None:
        connection.due = asyncio.get_running_loop().time() + seconds
        connection.began = False
        self._without_request[connection] = None

    def _close_overdue_connections(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = (
            loop.call_later(CHECK_SECONDS, self._close_overdue_connections) if self._open else None
        )
        now = loop.time()
        for connection in tuple(self._without_request):
            # While a client still reads an answer, `read_due` is set, and only the loop below may
            # close the connection.
            if connection.due is not None and connection.due <= now and not connection.read_due:
                self._abort_connection(connection)
        for connection, before in tuple(self._unread.items()):
            size = connection.count_unread_bytes()
            if size < before:
                self._unread[connection] = size
                self._unread_bytes -= before - size
                connection.read_due = now + READ_SECONDS
            elif connection.read_due <= now:
                self._abort_connection(connection)

    def _abort_connection(self, connection: _Connection) -> None:
        self.remove_connection(connection)
        connection.transport.abort()


class _Connection(asyncio.Protocol):
    """Wraps aiohttp's protocol, and stores the time limits for the client of one connection.

    Attributes:
        due: The loop time by which the headers of a request must arrive; None during a request.
        began: Whether bytes have arrived since the last request.
        read_due: The loop time by which the client must read; 0: nothing waits for it.
    """

    transport: asyncio.Transport
    due: float | None
    began: bool

    def __init__(self, connections: InboundConnections, protocol: asyncio.Protocol) -> None:
        self.read_due = 0.0
        self._connections = connections
        self._protocol = protocol

    def count_unread_bytes(self) -> int:
        """Return the number of bytes that were sent and that the client has not read yet."""
        return self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._connections.add_connection(self):
            self._protocol.connection_made(transport)
        else:
            # Hide the rejected connection from aiohttp: a bare `Protocol` ignores all its events.
            self._protocol = asyncio.Protocol()
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.due is not None and not self.began:
            self.began = True
            self.due = asyncio.get_running_loop().time() + HEADER_SECONDS
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self.read_due = asyncio.get_running_loop().time() + READ_SECONDS
        self._protocol.pause_writing()
        self._connections.add_unread_bytes(self)

    def resume_writing(self) -> None:
        self.read_due = 0.0
        if self.due is not None:
            # The client has now read the last answer, so start the time limit for its next request.
            self.due = asyncio.get_running_loop().time() + READ_SECONDS
        self._connections.remove_unread_bytes(self)
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove_connection(self)
        self._protocol.connection_lost(exc)


class HttpLog(logging.LoggerAdapter[logging.Logger]):
    """A logger for aiohttp that omits text that clients have sent.

    aiohttp's parser logs a malformed request, even its token, with a traceback at the level ERROR.
    Here such a request is one line at the level DEBUG: clients must not be able to fill the log.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a message of aiohttp; omit the text of a malformed request."""
        if isinstance(kwargs.get("exc_info"), HttpProcessingError):
            level, kwargs = logging.DEBUG, {**kwargs, "exc_info": None}
        super().log(level, msg, *args, **kwargs)


def host_is_address_or_localhost(host: str) -> bool:
    """Return whether a `Host` header has an IP address or `localhost`, with or without a port."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return name == "localhost"
    return True
