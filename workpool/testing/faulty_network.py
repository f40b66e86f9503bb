"""A network that can fail: a TCP proxy on the loopback address, one for each worker.

Owns the connections between one worker and the control plane. Does not parse the bytes: its
failures are below HTTP, where neither side is notified. Faults of single calls are in `fault`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from workpool.testing.bounded_wait import WAIT_SECONDS, Changes
from workpool.testing.http_faults import reset_connection

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_CHUNK_BYTES: Final = 64 * 1024
_HOST: Final = "127.0.0.1"


@dataclass(eq=False, slots=True)
class _Link:
    """One connection of the worker, and its connection to the control plane.

    Attributes:
        plane: The connection to the control plane; None until it is open.
        swallowed: Whether bytes were dropped. Such a connection stays silent for good.
        half_closed: Whether the control plane's side was closed: the worker gets no more bytes.
    """

    worker: asyncio.StreamWriter
    plane: asyncio.StreamWriter | None = None
    swallowed: bool = False
    half_closed: bool = False


class Proxy:
    """A network between one worker and a control plane, which can be made to fail.

    Use `async with Proxy(plane.base_url) as network:` and give `network.base_url` to one worker.
    Failures apply to open and to new connections, until `heal()`. Used on the loop that entered it.

    Attributes:
        base_url: The address for the worker; set on entering.
        accepted: The number of connections so far.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.accepted = 0
        self._target = urlsplit(base_url)
        self._links: set[_Link] = set()
        self._passing = asyncio.Event()
        self._swallowing = False
        self._delay = 0.0
        self._bytes_per_second: float | None = None
        self._changes = Changes()
        self._stack = AsyncExitStack()

    # Methods that inject and end failures.

    def blackhole(self) -> None:
        """Drop every byte in both directions, without closing a connection.

        After `heal()` only new connections work. Those that lost bytes stay silent, as behind a
        firewall that has forgotten them.
        """
        self.heal()
        self._swallowing = True

    def partition(self) -> None:
        """Delay every byte in both directions until `heal()`, as TCP does in an outage."""
        self.heal()
        self._passing.clear()

    def delay(self, seconds: float) -> None:
        """Delay every byte by `seconds`, in each direction."""
        self.heal()
        self._delay = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Limit each connection to `bytes_per_second`, in each direction."""
        self.heal()
        self._bytes_per_second = bytes_per_second

    def half_close(self) -> None:
        """Close the control plane's side of every open connection; requests still arrive."""
        for link in self._links:
            link.half_closed = True
            with suppress(OSError):  # the worker has closed the connection
                link.worker.write_eof()

    def reset(self) -> None:
        """Reset every open connection on both sides. New connections work."""
        for link in self._links:
            reset_connection(link.worker.transport)
            if link.plane is not None:
                reset_connection(link.plane.transport)

    def heal(self) -> None:
        """End all failures."""
        self._swallowing = False
        self._delay, self._bytes_per_second = 0.0, None
        self._passing.set()

    async def connected(self, count: int = 1, timeout: float = WAIT_SECONDS) -> None:
        """Wait until `count` connections were accepted in total."""
        await self._changes.until(
            lambda: self.accepted >= count,
            lambda: f"{count} connections; there were {self.accepted}",
            timeout,
        )

    # Start, forwarding and end.

    async def __aenter__(self) -> Self:
        self.heal()
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            ending = asyncio.Event()
            stack.callback(ending.set)

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self.accepted += 1
                group.create_task(
                    self._forward_connection(ending, reader, writer), name="proxy-link"
                )
                self._changes.notify()

            server = await asyncio.start_server(accept, _HOST, 0, limit=_CHUNK_BYTES)
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
        # `aclose` does not pass the block's error to the task group, which would wrap it.
        await self._stack.aclose()

    async def _forward_connection(
        self, ending: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Forward one connection until both sides or the proxy have ended."""
        link = _Link(writer)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                carrying = group.create_task(self._connect_and_forward(reader, link))
                watching = group.create_task(ending.wait())
                await asyncio.wait({carrying, watching}, return_when=asyncio.FIRST_COMPLETED)
                carrying.cancel()
                watching.cancel()
        finally:
            self._links.discard(link)
            writer.transport.abort()

    async def _connect_and_forward(self, reader: asyncio.StreamReader, link: _Link) -> None:
        host, port = self._target.hostname, self._target.port
        try:
            answers, plane = await asyncio.open_connection(host, port, limit=_CHUNK_BYTES)
        except OSError:  # no server: the worker's connection is closed
            return
        link.plane = plane
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward_direction(link, reader, plane))
                group.create_task(self._forward_direction(link, answers, link.worker))
        finally:
            plane.transport.abort()

    async def _forward_direction(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Forward the bytes of one direction, and then the end of the stream."""
        with suppress(OSError):  # reset or aborted: the other direction ends by itself
            while chunk := await source.read(self._read_size()):
                await self._wait_for_network(len(chunk))
                if self._drops_bytes(link):
                    continue
                if not (link.half_closed and sink is link.worker):
                    sink.write(chunk)
                    await sink.drain()
            await self._wait_for_network(0)
            if not self._drops_bytes(link):
                sink.write_eof()
                return
            # The end of the stream is not forwarded; only the end of the proxy ends this wait.
            await asyncio.Event().wait()
        if not link.swallowed:
            sink.transport.abort()

    def _read_size(self) -> int:
        """Return how many bytes to read at once. A throttle allows the bytes of 0.1 s."""
        if self._bytes_per_second is None:
            return _CHUNK_BYTES
        return max(1, int(self._bytes_per_second / 10))

    async def _wait_for_network(self, count: int) -> None:
        """Wait for the injected delay, the throttle and the end of a partition."""
        pace = self._bytes_per_second
        await asyncio.sleep(self._delay + (count / pace if pace else 0.0))
        while not self._passing.is_set():  # a second partition may directly follow the first
            await self._passing.wait()

    def _drops_bytes(self, link: _Link) -> bool:
        link.swallowed |= self._swallowing
        return link.swallowed
