"""A TCP load balancer (round robin) in front of the nodes of a control plane.

A node that does not accept the connection is skipped. No request is tried twice: a client whose
node is killed loses its connection, as behind a real balancer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

_CHUNK_BYTES = 65_536
_CONNECT_SECONDS = 2.0


class Balancer:
    """The balancer on `port` of the loopback interface; `nodes` are ports of the same interface."""

    def __init__(self, port: int, nodes: Sequence[int]) -> None:
        self._port = port
        self._nodes = tuple(nodes)
        self._turns = count()
        self._connections: set[asyncio.Task[object]] = set()
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve_client, "127.0.0.1", self._port)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # `__aexit__` cancels this task, waits for its end and ignores its result.
            with suppress(asyncio.CancelledError):
                await self._connect_to_node(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _connect_to_node(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for _ in self._nodes:
            node = self._nodes[next(self._turns) % len(self._nodes)]
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    answers, requests = await asyncio.open_connection("127.0.0.1", node)
            except (OSError, TimeoutError):
                continue
            await _copy_both_directions(reader, requests, answers, writer)
            return


async def _copy_both_directions(
    reader: asyncio.StreamReader,
    requests: asyncio.StreamWriter,
    answers: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Copy bytes in both directions until one side closes, then close the other side."""
    try:
        async with asyncio.TaskGroup() as group:
            ways = [
                group.create_task(_copy_bytes(reader, requests)),
                group.create_task(_copy_bytes(answers, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
    finally:
        requests.close()


async def _copy_bytes(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await source.read(_CHUNK_BYTES):
            target.write(chunk)
            await target.drain()
