"""A TCP proxy that simulates network failures between a worker and a control plane.

The proxy listens on the loopback address; each worker has its own. The bytes are not parsed: the
failures are below HTTP, where neither side is notified. Faults of single calls are in `fault`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from workpool.testing.bounded_wait import WAIT_SECONDS, BoundedCondition
from workpool.testing.http_faults import reset_connection

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_CHUNK_BYTES: Final = 64 * 1024
_HOST: Final = "127.0.0.1"


@dataclass(eq=False, slots=True)
class _ProxiedConnection:
    """A worker's connection to the proxy, and the proxy's connection to the control plane.

    Attributes:
        plane: The connection to the control plane; None until it is open.
        lost_bytes: Whether bytes were dropped. Such a connection stays silent for good.
        half_closed: Whether the control plane's side was closed: the worker gets no more bytes.
    """

    worker: asyncio.StreamWriter
    plane: asyncio.StreamWriter | None = None
    lost_bytes: bool = False
    half_closed: bool = False


class Proxy:
    """A TCP proxy between one worker and a control plane, with failures on demand.

    Use `async with Proxy(plane.base_url) as network:` and give `network.base_url` to one worker.
    Failures apply to open and to new connections, until `heal()`. All calls are made on the loop
    that entered the proxy.

    Attributes:
        base_url: The address for the worker; set on entering.
        accepted: The number of connections so far.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.accepted = 0
        self._target = urlsplit(base_url)
        self._connections: set[_ProxiedConnection] = set()
        self._network_up = asyncio.Event()
        self._drops_all_bytes = False
        self._delay = 0.0
        self._bytes_per_second: float | None = None
        self._changes = BoundedCondition()
        self._stack = AsyncExitStack()

    def blackhole(self) -> None:
        """Drop every byte in both directions, without closing a connection.

        After `heal()` only new connections work. Those that lost bytes stay silent, as behind a
        firewall that has forgotten them.
        """
        self.heal()
        self._drops_all_bytes = True

    def partition(self) -> None:
        """Keep every byte back, in both directions, until `heal()`.

        No byte is lost, as in a network outage after which TCP sends the bytes again.
        """
        self.heal()
        self._network_up.clear()

    def delay(self, seconds: float) -> None:
        """Delay every byte by `seconds`, in each direction."""
        self.heal()
        self._delay = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Limit each connection to `bytes_per_second`, in each direction."""
        self.heal()
        self._bytes_per_second = bytes_per_second

    def half_close(self) -> None:
        """Send EOF to the worker on every open connection.

        The connections still deliver requests to the control plane, but no answers to the worker.
        """
        for connection in self._connections:
            connection.half_closed = True
            # `write_eof` fails if the worker has already closed the connection.
            with suppress(OSError):
                connection.worker.write_eof()

    def reset(self) -> None:
        """Reset every open connection on both sides; new connections work."""
        for connection in self._connections:
            reset_connection(connection.worker.transport)
            if connection.plane is not None:
                reset_connection(connection.plane.transport)

    def heal(self) -> None:
        """End all failures. A connection that has lost bytes transfers no further bytes."""
        self._drops_all_bytes = False
        self._delay, self._bytes_per_second = 0.0, None
        self._network_up.set()

    async def connected(self, count: int = 1, timeout: float = WAIT_SECONDS) -> None:
        """Wait until `count` connections were accepted in total."""
        await self._changes.wait_until(
            lambda: self.accepted >= count,
            lambda: f"{count} connections; there were {self.accepted}",
            timeout,
        )

    async def __aenter__(self) -> Self:
        self.heal()
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            proxy_ends = asyncio.Event()
            stack.callback(proxy_ends.set)

            def accept_connection(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter
            ) -> None:
                self.accepted += 1
                group.create_task(
                    self._forward_connection(proxy_ends, reader, writer), name="proxy-connection"
                )
                self._changes.notify_all()

            server = await asyncio.start_server(accept_connection, _HOST, 0, limit=_CHUNK_BYTES)
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            self.base_url = self._target._replace(netloc=f"{_HOST}:{port}").geturl()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Close the stack without the error of the `async with` block: the task group would wrap
        # the error in an ExceptionGroup.
        await self._stack.aclose()

    async def _forward_connection(
        self, proxy_ends: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Forward one connection until both sides have closed it or the proxy ends."""
        connection = _ProxiedConnection(writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                forwarding = group.create_task(self._connect_and_forward(reader, connection))
                waiting_for_end = group.create_task(proxy_ends.wait())
                await asyncio.wait(
                    {forwarding, waiting_for_end}, return_when=asyncio.FIRST_COMPLETED
                )
                forwarding.cancel()
                waiting_for_end.cancel()
        finally:
            self._connections.discard(connection)
            writer.transport.abort()

    async def _connect_and_forward(
        self, reader: asyncio.StreamReader, connection: _ProxiedConnection
    ) -> None:
        host, port = self._target.hostname, self._target.port
        try:
            answers, plane = await asyncio.open_connection(host, port, limit=_CHUNK_BYTES)
        except OSError:
            # The control plane is not reachable. The caller closes the connection of the worker.
            return
        connection.plane = plane
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward_bytes_of_direction(connection, reader, plane))
                group.create_task(
                    self._forward_bytes_of_direction(connection, answers, connection.worker)
                )
        finally:
            plane.transport.abort()

    async def _forward_bytes_of_direction(
        self,
        connection: _ProxiedConnection,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
    ) -> None:
        """Forward the bytes of one direction, and then the end of the stream (EOF)."""
        # Reading or writing raises OSError if one side was reset: the code after this block aborts
        # the other side.
        with suppress(OSError):
            while chunk := await source.read(self._next_read_size()):
                await self._wait_for_injected_failures(len(chunk))
                if self._drops_bytes(connection):
                    continue
                if not (connection.half_closed and sink is connection.worker):
                    sink.write(chunk)
                    await sink.drain()
            await self._wait_for_injected_failures(0)
            if not self._drops_bytes(connection):
                sink.write_eof()
                return
            # A black hole does not forward the end of the stream. So this task waits until
            # the proxy is closed, which cancels the task.
            await asyncio.Event().wait()
        if not connection.lost_bytes:
            sink.transport.abort()

    def _next_read_size(self) -> int:
        """Return the largest number of bytes that the next read of a connection may return.

        With a throttle, this is the number of bytes that may pass in 0.1 s.
        """
        if self._bytes_per_second is None:
            return _CHUNK_BYTES
        return max(1, int(self._bytes_per_second / 10))

    async def _wait_for_injected_failures(self, count: int) -> None:
        """Wait for the injected delay, the throttle and the end of a partition."""
        pace = self._bytes_per_second
        await asyncio.sleep(self._delay + (count / pace if pace else 0.0))
        # Check for a partition again after each wait: a new one may begin before this task goes on.
        while not self._network_up.is_set():
            await self._network_up.wait()

    def _drops_bytes(self, connection: _ProxiedConnection) -> bool:
        connection.lost_bytes |= self._drops_all_bytes
        return connection.lost_bytes
