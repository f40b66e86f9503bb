"""Each change is stored before its request is answered, so a kill loses no answered change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV, TOKEN, ApiClient, HttpAnswer, wait_until
from workpool.server import ControlPlane, MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import aiohttp


class StoreWithBlockedCommits(MemoryStore):
    """A memory store whose commits wait while the event `gate` is not set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def wait_until_durable(self) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1


@pytest.fixture
def store_with_blocked_commits() -> StoreWithBlockedCommits:
    return StoreWithBlockedCommits()


@pytest.fixture
async def api(
    store_with_blocked_commits: StoreWithBlockedCommits,
    http_session: aiohttp.ClientSession,
    dialect: str,
) -> AsyncIterator[ApiClient]:
    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, store=store_with_blocked_commits
    ) as plane:
        yield ApiClient(plane, http_session, dialect)


async def assert_answer_comes_after_commit(
    store: StoreWithBlockedCommits, answer: Awaitable[HttpAnswer]
) -> HttpAnswer:
    """Check that `answer` does not arrive before the store has committed, and return it."""
    store.gate.clear()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(await_answer(answer))
        async with asyncio.timeout(20):
            await wait_until(lambda: store.waiting or asking.done())
        assert not asking.done()
        store.gate.set()
    return asking.result()


async def await_answer(answer: Awaitable[HttpAnswer]) -> HttpAnswer:
    return await answer


CALLS: dict[str, tuple[str, Callable[[ApiClient, str], Awaitable[HttpAnswer]]]] = {
    "enqueue": ("queued", lambda api, _: api("POST", api.work_url())),
    "poll": ("queued", lambda api, _: api.poll()),
    "a poll that finds nothing": ("stopped", lambda api, _: api.poll()),
    "ack": ("queued", lambda api, work_id: api.ack(work_id)),
    "heartbeat": ("starting", lambda api, work_id: api.heartbeat(work_id)),
    "stop": ("active", lambda api, work_id: api.stop(work_id)),
    "update": ("active", lambda api, work_id: api.update(work_id, json={"metadata": {"a": "b"}})),
    "get": ("active", lambda api, work_id: api.get(work_id)),
    "list": ("active", lambda api, _: api("GET", api.work_url())),
    "stats": ("active", lambda api, _: api("GET", api.work_url("/stats"))),
}


@pytest.mark.parametrize("call", CALLS)
async def test_call_is_answered_only_after_its_change_is_stored(
    api: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits, call: str
) -> None:
    state, ask = CALLS[call]
    work_id = await api.create_item_in_state(state)
    assert (
        await assert_answer_comes_after_commit(store_with_blocked_commits, ask(api, work_id))
    ).status in {200, 204}


async def test_session_and_events_are_returned_only_after_they_are_stored(
    api: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    api.plane.enqueue(script=[{"name": "Bash", "input": {}}])
    [item] = (await api("GET", api.work_url())).body["data"]
    session = f"{api.base_url}/sessions/{item['data']['id']}"
    assert (
        await assert_answer_comes_after_commit(store_with_blocked_commits, api("GET", session))
    ).status == 200
    listed = await assert_answer_comes_after_commit(
        store_with_blocked_commits, api("GET", f"{session}/events")
    )
    [use] = [event for event in listed.body["data"] if event["type"] == "agent.tool_use"]
    result_body = {
        "events": [{"type": "user.tool_result", "tool_use_id": use["id"], "content": []}]
    }
    assert (
        await assert_answer_comes_after_commit(
            store_with_blocked_commits, api("POST", f"{session}/events", json=result_body)
        )
    ).status == 200
    # A client that lost the first answer repeats the call. The client takes the status 409 as proof
    # that the first call was stored, so the 409 must not be sent earlier.
    assert (
        await assert_answer_comes_after_commit(
            store_with_blocked_commits, api("POST", f"{session}/events", json=result_body)
        )
    ).status == 409


async def test_response_409_is_sent_only_after_earlier_change_is_stored(
    api: ApiClient, store_with_blocked_commits: StoreWithBlockedCommits
) -> None:
    stopped = await api.create_item_in_state("stopped")
    answers = [
        await assert_answer_comes_after_commit(store_with_blocked_commits, api.ack(stopped)),
        await assert_answer_comes_after_commit(store_with_blocked_commits, api.heartbeat(stopped)),
    ]
    # The qoder dialect answers a second stop with 200, and not with the conflict 409.
    if api.dialect == "anthropic":
        answers.append(
            await assert_answer_comes_after_commit(
                store_with_blocked_commits, api.stop(stopped, json={"force": True})
            )
        )
    # In the anthropic dialect, a heartbeat of a stopped item is answered with 200 and the item's
    # state.
    allowed = {200, 409} if api.dialect == "anthropic" else {409}
    assert {answer.status for answer in answers} == allowed
