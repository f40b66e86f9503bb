"""A poll whose client has disconnected receives no item, at whatever time it disconnected.

See workpool/docs/protocol.md, "Poll".
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV, TOKEN, ApiClient, wait_until
from workpool.server import ControlPlane, MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

pytestmark = pytest.mark.usefixtures("allow_polls_of_one_minute")


class BlockingStore(MemoryStore):
    """A store whose commits wait until the test lets them continue."""

    def __init__(self) -> None:
        self.may_store = asyncio.Event()
        self.waiting = 0

    async def wait_until_durable(self) -> None:
        self.waiting += 1
        try:
            await self.may_store.wait()
        finally:
            self.waiting -= 1


@pytest.fixture
def blocking_store() -> BlockingStore:
    return BlockingStore()


@pytest.fixture
async def blocked_api(
    blocking_store: BlockingStore, http_session: aiohttp.ClientSession
) -> AsyncIterator[ApiClient]:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=blocking_store)
    async with plane:
        yield ApiClient(plane, http_session, "qoder")
        blocking_store.may_store.set()


async def send_poll(api: ApiClient, query: str = "block_ms=60000") -> socket.socket:
    """Send a poll on a plain socket; return the socket, which the test closes."""
    connection = socket.create_connection(("127.0.0.1", api.plane.port))
    connection.setblocking(False)  # noqa: FBT003 - socket's own signature
    request = (
        f"GET {api.work_url('/poll').partition(str(api.plane.port))[2]}?{query} HTTP/1.1\r\n"
        f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nWorker-ID: ghost\r\n\r\n"
    )
    await asyncio.get_running_loop().sock_sendall(connection, request.encode())
    return connection


def history_kinds(api: ApiClient) -> list[str]:
    return [record.kind for record in api.plane.history]


async def test_client_disconnected_during_wait_receives_no_item(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    connection = await send_poll(api)
    await wait_until(lambda: len(waiting) == 1)
    connection.close()
    await wait_until(lambda: len(waiting) == 0)
    api.plane.enqueue()
    assert history_kinds(api) == ["created"]
    assert (await api.claim_item())["id"]


async def test_client_that_disconnects_in_same_loop_iteration_as_enqueue_receives_no_item(
    api: ApiClient,
) -> None:
    """When the poll wakes, the connection is closed, but the event loop has not noticed it yet."""
    waiting = api.plane.operations.get_queue(ENV).waiting
    connection = await send_poll(api)
    await wait_until(lambda: len(waiting) == 1)
    connection.close()
    api.plane.enqueue()
    await wait_until(lambda: len(waiting) == 0)
    assert (await api.claim_item())["id"]
    assert history_kinds(api) == ["created", "delivered"]


async def test_item_for_disconnected_client_goes_to_next_waiting_poll(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    connection = await send_poll(api)
    await wait_until(lambda: len(waiting) == 1)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 2)
        connection.close()
        (item,) = api.plane.enqueue()
    assert poll.result().body["id"] == item.id
    assert history_kinds(api) == ["created", "delivered"]


async def test_client_that_disconnects_after_sending_poll_receives_no_item(api: ApiClient) -> None:
    api.plane.enqueue()
    for _ in range(20):
        (await send_poll(api, "")).close()
    assert (await api.claim_item())["id"]
    assert history_kinds(api) == ["created", "delivered"]


async def test_delivery_is_withdrawn_if_client_disconnects_while_delivery_is_stored(
    blocked_api: ApiClient, blocking_store: BlockingStore
) -> None:
    (item,) = blocked_api.plane.enqueue()
    connection = await send_poll(blocked_api)
    await wait_until(lambda: blocking_store.waiting == 1)
    assert history_kinds(blocked_api) == ["created", "delivered"]
    connection.close()
    await wait_until(lambda: blocking_store.waiting == 0)
    await wait_until(lambda: history_kinds(blocked_api) == ["created", "delivered", "withdrawn"])
    blocking_store.may_store.set()
    assert (await blocked_api.claim_item(worker="b"))["id"] == item.id
    assert (await blocked_api.ack(item.id, worker="b")).status == 200


async def test_delivery_is_withdrawn_if_client_disconnects_in_same_loop_iteration_as_commit(
    blocked_api: ApiClient, blocking_store: BlockingStore
) -> None:
    blocked_api.plane.enqueue()
    connection = await send_poll(blocked_api)
    await wait_until(lambda: blocking_store.waiting == 1)
    connection.close()
    blocking_store.may_store.set()
    await wait_until(lambda: history_kinds(blocked_api)[-1] == "withdrawn")
    assert (await blocked_api.claim_item())["id"]


async def test_withdrawn_delivery_wakes_next_poll(
    blocked_api: ApiClient, blocking_store: BlockingStore
) -> None:
    waiting = blocked_api.plane.operations.get_queue(ENV).waiting
    (item,) = blocked_api.plane.enqueue()
    connection = await send_poll(blocked_api)
    await wait_until(lambda: blocking_store.waiting == 1)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(blocked_api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 1)
        connection.close()
        await wait_until(lambda: len(waiting) == 0)
        blocking_store.may_store.set()
    assert poll.result().body["id"] == item.id


async def test_delivery_of_item_acknowledged_meanwhile_is_not_withdrawn(
    blocked_api: ApiClient, blocking_store: BlockingStore
) -> None:
    (item,) = blocked_api.plane.enqueue()
    connection = await send_poll(blocked_api)
    await wait_until(lambda: blocking_store.waiting == 1)
    blocked_api.plane.operations.ack_item(ENV, item.id, "ghost")
    connection.close()
    await wait_until(lambda: blocking_store.waiting == 0)
    blocking_store.may_store.set()
    assert await blocked_api.item_state(item.id) == "starting"
    assert "withdrawn" not in history_kinds(blocked_api)


async def test_closing_control_plane_answers_waiting_polls(
    http_session: aiohttp.ClientSession,
) -> None:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None})
    async with asyncio.TaskGroup() as group, plane:
        api = ApiClient(plane, http_session, "qoder")
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(plane.operations.get_queue(ENV).waiting) == 1)
    assert (poll.result().status, poll.result().body) == (200, None)
