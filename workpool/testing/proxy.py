"""A network that fails: a TCP proxy on the loopback, one per worker.

Owns the bytes between one worker and its control plane. Never reads them: what goes wrong here
goes wrong below HTTP, where neither side is told. Faults of single calls are in `actions`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from workpool.testing.actions import reset_connection
from workpool.testing.changes import WAIT_SECONDS, Changes

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_CHUNK_BYTES: Final = 64 * 1024
_HOST: Final = "127.0.0.1"


@dataclass(eq=False, slots=True)
class _Link:
    """One connection of the worker, and the one made for it to the control plane.

    Attributes:
        plane: None until it is made.
        swallowed: Bytes of it are gone, so that it can never be right again: it stays silent.
        half_closed: The worker was told that no answer will come.
    """

    worker: asyncio.StreamWriter
    plane: asyncio.StreamWriter | None = None
    swallowed: bool = False
    half_closed: bool = False


class Proxy:
    """A way to a control plane that can be made to fail.

    `async with Proxy(plane.base_url) as way:` and point one worker to `way.base_url`; the others
    go on without. Faults hold for the connections that are open and for those to come, until
    `heal()`. Belongs to the loop that entered it.

    Attributes:
        base_url: What the worker is given; set on entering.
        accepted: How many connections there were.
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

    # What goes wrong.

    def blackhole(self) -> None:
        """Swallow every byte both ways. Nothing is closed; the swallowed bytes are lost.

        After `heal()` only new connections work: those that lost bytes stay silent, as behind a
        firewall that has forgotten them.
        """
        self.heal()
        self._swallowing = True

    def partition(self) -> None:
        """Hold back every byte both ways; `heal()` delivers them, as TCP does after an outage."""
        self.heal()
        self._passing.clear()

    def delay(self, seconds: float) -> None:
        """Let everything arrive later, each way."""
        self.heal()
        self._delay = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Let no connection carry more than this, each way."""
        self.heal()
        self._bytes_per_second = bytes_per_second

    def half_close(self) -> None:
        """End the control plane's side of every open connection; requests still go through."""
        for link in self._links:
            link.half_closed = True
            with suppress(OSError):  # the worker has closed it already
                link.worker.write_eof()

    def reset(self) -> None:
        """Reset every open connection, both ways; new ones work."""
        for link in self._links:
            reset_connection(link.worker.transport)
            if link.plane is not None:
                reset_connection(link.plane.transport)

    def heal(self) -> None:
        """Let everything through again, at once."""
        self._swallowing = False
        self._delay, self._bytes_per_second = 0.0, None
        self._passing.set()

    async def connected(self, count: int = 1, timeout: float = WAIT_SECONDS) -> None:
        """Wait until so many connections have been made, since the beginning."""
        await self._changes.until(
            lambda: self.accepted >= count,
            lambda: f"{count} connections; there were {self.accepted}",
            timeout,
        )

    # Its life.

    async def __aenter__(self) -> Self:
        self.heal()
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(asyncio.TaskGroup())
            ending = asyncio.Event()
            stack.callback(ending.set)

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self.accepted += 1
                group.create_task(self._live(ending, reader, writer), name="proxy-link")
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
        await self._stack.aclose()  # without the block's error, which is to come out as it is

    async def _live(
        self, ending: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one connection until both sides have ended, or the proxy has."""
        link = _Link(writer)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                carrying = group.create_task(self._connect(reader, link))
                watching = group.create_task(ending.wait())
                await asyncio.wait({carrying, watching}, return_when=asyncio.FIRST_COMPLETED)
                carrying.cancel()
                watching.cancel()
        finally:
            self._links.discard(link)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, link: _Link) -> None:
        host, port = self._target.hostname, self._target.port
        try:
            answers, plane = await asyncio.open_connection(host, port, limit=_CHUNK_BYTES)
        except OSError:  # nobody there: the worker sees its connection closed
            return
        link.plane = plane
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(link, reader, plane))
                group.create_task(self._carry(link, answers, link.worker))
        finally:
            plane.transport.abort()

    async def _carry(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Carry one way, until its end has been carried too."""
        with suppress(OSError):  # reset or aborted: the other way ends by itself
            while chunk := await source.read(self._portion()):
                await self._hold_up(len(chunk))
                if self._swallows(link):
                    continue
                if not (link.half_closed and sink is link.worker):
                    sink.write(chunk)
                    await sink.drain()
            await self._hold_up(0)
            if not self._swallows(link):
                sink.write_eof()
                return
            await asyncio.Event().wait()  # nobody learns of this end; cut short by our own
        if not link.swallowed:
            sink.transport.abort()

    def _portion(self) -> int:
        """How much to take at once: no more than a tenth of a second's worth."""
        if self._bytes_per_second is None:
            return _CHUNK_BYTES
        return max(1, int(self._bytes_per_second / 10))

    async def _hold_up(self, count: int) -> None:
        """Wait as long as the network's state says."""
        pace = self._bytes_per_second
        await asyncio.sleep(self._delay + (count / pace if pace else 0.0))
        while not self._passing.is_set():  # a second partition may follow the first at once
            await self._passing.wait()

    def _swallows(self, link: _Link) -> bool:
        link.swallowed |= self._swallowing
        return link.swallowed
