"""A poll whose client has disconnected takes no item, whenever the client disconnected.

See workpool/docs/protocol.md, "Poll".
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV, TOKEN, Api, until
from workpool.server import ControlPlane, MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp


class Gate(MemoryStore):
    """A store whose commits wait until the test lets them continue."""

    def __init__(self) -> None:
        self.open_gate = asyncio.Event()
        self.waiting = 0

    async def durable(self) -> None:
        self.waiting += 1
        try:
            await self.open_gate.wait()
        finally:
            self.waiting -= 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def gated(gate: Gate, http: aiohttp.ClientSession) -> AsyncIterator[Api]:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=gate)
    async with plane:
        yield Api(plane, http, "qoder")
        gate.open_gate.set()


async def hang_on(api: Api, query: str = "block_ms=999") -> socket.socket:
    """Send a poll on a plain socket and return the socket, so that the test can close it itself."""
    connection = socket.create_connection(("127.0.0.1", api.plane.port))
    connection.setblocking(False)  # noqa: FBT003 - socket's own signature
    request = (
        f"GET {api.work('/poll').partition(str(api.plane.port))[2]}?{query} HTTP/1.1\r\n"
        f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nWorker-ID: ghost\r\n\r\n"
    )
    await asyncio.get_running_loop().sock_sendall(connection, request.encode())
    return connection


def kinds(api: Api) -> list[str]:
    return [record.kind for record in api.plane.history]


async def test_client_gone_during_wait_receives_no_item(api: Api) -> None:
    waiting = api.plane.operations.queue(ENV).waiting
    connection = await hang_on(api)
    await until(lambda: len(waiting) == 1)
    connection.close()
    await until(lambda: len(waiting) == 0)
    api.plane.enqueue()
    assert kinds(api) == ["created"]
    assert (await api.claim())["id"]


async def test_client_gone_in_same_loop_turn_as_arrival_receives_no_item(api: Api) -> None:
    """When the poll wakes, the kernel knows of the closed connection, but the loop does not."""
    waiting = api.plane.operations.queue(ENV).waiting
    connection = await hang_on(api)
    await until(lambda: len(waiting) == 1)
    connection.close()
    api.plane.enqueue()
    await until(lambda: len(waiting) == 0)
    assert (await api.claim())["id"]
    assert kinds(api) == ["created", "delivered"]


async def test_item_for_gone_client_goes_to_next_waiting_poll(api: Api) -> None:
    waiting = api.plane.operations.queue(ENV).waiting
    connection = await hang_on(api)
    await until(lambda: len(waiting) == 1)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "999"}))
        await until(lambda: len(waiting) == 2)
        connection.close()
        (item,) = api.plane.enqueue()
    assert poll.result().body["id"] == item.id
    assert kinds(api) == ["created", "delivered"]


async def test_client_gone_right_after_request_receives_no_item(api: Api) -> None:
    api.plane.enqueue()
    for _ in range(20):
        (await hang_on(api, "")).close()
    assert (await api.claim())["id"]
    assert kinds(api) == ["created", "delivered"]


async def test_client_gone_while_delivery_is_stored_has_it_withdrawn(
    gated: Api, gate: Gate
) -> None:
    (item,) = gated.plane.enqueue()
    connection = await hang_on(gated)
    await until(lambda: gate.waiting == 1)
    assert kinds(gated) == ["created", "delivered"]
    connection.close()
    await until(lambda: gate.waiting == 0)
    await until(lambda: kinds(gated) == ["created", "delivered", "withdrawn"])
    gate.open_gate.set()
    assert (await gated.claim(worker="b"))["id"] == item.id
    assert (await gated.ack(item.id, worker="b")).status == 200


async def test_client_gone_in_same_loop_turn_as_storage_has_delivery_withdrawn(
    gated: Api, gate: Gate
) -> None:
    gated.plane.enqueue()
    connection = await hang_on(gated)
    await until(lambda: gate.waiting == 1)
    connection.close()
    gate.open_gate.set()
    await until(lambda: kinds(gated)[-1] == "withdrawn")
    assert (await gated.claim())["id"]


async def test_withdrawn_delivery_wakes_next_poll(gated: Api, gate: Gate) -> None:
    waiting = gated.plane.operations.queue(ENV).waiting
    (item,) = gated.plane.enqueue()
    connection = await hang_on(gated)
    await until(lambda: gate.waiting == 1)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(gated.poll(params={"block_ms": "999"}))
        await until(lambda: len(waiting) == 1)
        connection.close()
        await until(lambda: len(waiting) == 0)
        gate.open_gate.set()
    assert poll.result().body["id"] == item.id


async def test_delivery_of_item_acknowledged_meanwhile_is_not_withdrawn(
    gated: Api, gate: Gate
) -> None:
    (item,) = gated.plane.enqueue()
    connection = await hang_on(gated)
    await until(lambda: gate.waiting == 1)
    gated.plane.operations.ack(ENV, item.id, "ghost")
    connection.close()
    await until(lambda: gate.waiting == 0)
    gate.open_gate.set()
    assert await gated.state(item.id) == "starting"
    assert "withdrawn" not in kinds(gated)


async def test_closing_control_plane_answers_waiting_polls(http: aiohttp.ClientSession) -> None:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None})
    async with asyncio.TaskGroup() as group, plane:
        api = Api(plane, http, "qoder")
        poll = group.create_task(api.poll(params={"block_ms": "999"}))
        await until(lambda: len(plane.operations.queue(ENV).waiting) == 1)
    assert (poll.result().status, poll.result().body) == (200, None)
