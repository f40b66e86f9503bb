"""Tests of the load balancer for chaos tests, which uses nodes in turn and skips dead ones."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from tests.chaos.balancer import Balancer
from tests.reserved_port import reserve_port

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def make_echo_node(
    name: bytes,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Return a server callback that answers each line with `name`, a space and the same line."""

    async def echo_lines_with_node_name(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while line := await reader.readline():
            writer.write(name + b" " + line)
        writer.close()

    return echo_lines_with_node_name


async def exchange_hello(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_balancer_uses_nodes_in_turn_and_skips_dead_node() -> None:
    async with AsyncExitStack() as stack:
        ports = []
        for name in (b"one", b"two"):
            server = await asyncio.start_server(make_echo_node(name), "127.0.0.1", 0)
            await stack.enter_async_context(server)
            ports.append(server.sockets[0].getsockname()[1])
        dead, port = (stack.enter_context(reserve_port()) for _ in range(2))
        async with asyncio.timeout(20), Balancer(port, [ports[0], dead, ports[1]]):
            answers = [await exchange_hello(port) for _ in range(4)]
    assert answers[0] == b"one hello\n"
    assert set(answers) == {b"one hello\n", b"two hello\n"}


async def test_balancer_without_running_node_closes_connection() -> None:
    with reserve_port() as port, reserve_port() as dead:
        async with asyncio.timeout(20), Balancer(port, [dead]):
            assert await exchange_hello(port) == b""
