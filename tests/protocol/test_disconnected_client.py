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


class StoreWithBlockedCommits(MemoryStore):
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
def store_with_blocked_commits() -> StoreWithBlockedCommits:
    return StoreWithBlockedCommits()


@pytest.fixture
async def api_with_blocked_commits(
    store_with_blocked_commits: StoreWithBlockedCommits, http_session: aiohttp.ClientSession
) -> AsyncIterator[ApiClient]:
    plane = ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, store=store_with_blocked_commits
    )
    async with plane:
        yield ApiClient(plane, http_session, "qoder")
        store_with_blocked_commits.may_store.set()


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


def list_history_record_kinds(api: ApiClient) -> list[str]:
    return [record.kind for record in api.plane.history]


async def test_client_disconnected_during_wait_receives_no_item(api: ApiClient) -> None:
    waiting = api.plane.operations.get_queue(ENV).waiting
    connection = await send_poll(api)
    await wait_until(lambda: len(waiting) == 1)
    connection.close()
    await wait_until(lambda: len(waiting) == 0)
    api.plane.enqueue()
    assert list_history_record_kinds(api) == ["created"]
    assert (await api.claim_item())["id"]


async def test_client_receives_no_item_if_it_disconnects_just_before_its_poll_wakes(
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
    assert list_history_record_kinds(api) == ["created", "delivered"]


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
    assert list_history_record_kinds(api) == ["created", "delivered"]


async def test_client_that_disconnects_after_sending_poll_receives_no_item(api: ApiClient) -> None:
    api.plane.enqueue()
    for _ in range(20):
        (await send_poll(api, "")).close()
    assert (await api.claim_item())["id"]
    assert list_history_record_kinds(api) == ["created", "delivered"]


async def test_server_withdraws_delivery_if_client_disconnects_before_delivery_is_stored(
    api_with_blocked_commits: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    (item,) = api_with_blocked_commits.plane.enqueue()
    connection = await send_poll(api_with_blocked_commits)
    await wait_until(lambda: store_with_blocked_commits.waiting == 1)
    assert list_history_record_kinds(api_with_blocked_commits) == ["created", "delivered"]
    connection.close()
    await wait_until(lambda: store_with_blocked_commits.waiting == 0)
    await wait_until(
        lambda: (
            list_history_record_kinds(api_with_blocked_commits)
            == ["created", "delivered", "withdrawn"]
        )
    )
    store_with_blocked_commits.may_store.set()
    assert (await api_with_blocked_commits.claim_item(worker="b"))["id"] == item.id
    assert (await api_with_blocked_commits.ack(item.id, worker="b")).status == 200


async def test_server_withdraws_delivery_if_client_disconnects_at_moment_of_commit(
    api_with_blocked_commits: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    api_with_blocked_commits.plane.enqueue()
    connection = await send_poll(api_with_blocked_commits)
    await wait_until(lambda: store_with_blocked_commits.waiting == 1)
    connection.close()
    store_with_blocked_commits.may_store.set()
    await wait_until(lambda: list_history_record_kinds(api_with_blocked_commits)[-1] == "withdrawn")
    assert (await api_with_blocked_commits.claim_item())["id"]


async def test_withdrawn_delivery_wakes_next_poll(
    api_with_blocked_commits: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    waiting = api_with_blocked_commits.plane.operations.get_queue(ENV).waiting
    (item,) = api_with_blocked_commits.plane.enqueue()
    connection = await send_poll(api_with_blocked_commits)
    await wait_until(lambda: store_with_blocked_commits.waiting == 1)
    async with asyncio.TaskGroup() as group:
        poll = group.create_task(api_with_blocked_commits.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(waiting) == 1)
        connection.close()
        await wait_until(lambda: len(waiting) == 0)
        store_with_blocked_commits.may_store.set()
    assert poll.result().body["id"] == item.id


async def test_server_does_not_withdraw_delivery_of_item_that_was_acknowledged_meanwhile(
    api_with_blocked_commits: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    (item,) = api_with_blocked_commits.plane.enqueue()
    connection = await send_poll(api_with_blocked_commits)
    await wait_until(lambda: store_with_blocked_commits.waiting == 1)
    api_with_blocked_commits.plane.operations.ack_item(ENV, item.id, "ghost")
    connection.close()
    await wait_until(lambda: store_with_blocked_commits.waiting == 0)
    store_with_blocked_commits.may_store.set()
    assert await api_with_blocked_commits.item_state(item.id) == "starting"
    assert "withdrawn" not in list_history_record_kinds(api_with_blocked_commits)


async def test_control_plane_answers_waiting_polls_when_it_closes(
    http_session: aiohttp.ClientSession,
) -> None:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None})
    async with asyncio.TaskGroup() as group, plane:
        api = ApiClient(plane, http_session, "qoder")
        poll = group.create_task(api.poll(params={"block_ms": "60000"}))
        await wait_until(lambda: len(plane.operations.get_queue(ENV).waiting) == 1)
    assert (poll.result().status, poll.result().body) == (200, None)
