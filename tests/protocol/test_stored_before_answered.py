"""Changes are stored before they are answered, so that a killed server loses no answered change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV, TOKEN, ApiClient, HttpAnswer, wait_until
from workpool.server import ControlPlane, MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import aiohttp


class GatedStore(MemoryStore):
    """A store whose commits wait while its gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def wait_until_durable(self) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1


@pytest.fixture
def gated_store() -> GatedStore:
    return GatedStore()


@pytest.fixture
async def api(
    gated_store: GatedStore, http_session: aiohttp.ClientSession, dialect: str
) -> AsyncIterator[ApiClient]:
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=gated_store) as plane:
        yield ApiClient(plane, http_session, dialect)


async def answer_after_storage(gate: GatedStore, answer: Awaitable[HttpAnswer]) -> HttpAnswer:
    """Check that the answer arrives only after the store has committed, and return it."""
    gate.gate.clear()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(await_answer(answer))
        async with asyncio.timeout(20):
            await wait_until(lambda: gate.waiting or asking.done())
        assert not asking.done()
        gate.gate.set()
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
    api: ApiClient, gated_store: GatedStore, call: str
) -> None:
    state, ask = CALLS[call]
    work_id = await api.create_item_in_state(state)
    assert (await answer_after_storage(gated_store, ask(api, work_id))).status in {200, 204}


async def test_session_and_events_are_returned_only_after_they_are_stored(
    api: ApiClient, gated_store: GatedStore
) -> None:
    api.plane.enqueue(script=[{"name": "Bash", "input": {}}])
    [item] = (await api("GET", api.work_url())).body["data"]
    session = f"{api.base_path}/sessions/{item['data']['id']}"
    assert (await answer_after_storage(gated_store, api("GET", session))).status == 200
    listed = await answer_after_storage(gated_store, api("GET", f"{session}/events"))
    [use] = [event for event in listed.body["data"] if event["type"] == "agent.tool_use"]
    result_body = {
        "events": [{"type": "user.tool_result", "tool_use_id": use["id"], "content": []}]
    }
    assert (
        await answer_after_storage(gated_store, api("POST", f"{session}/events", json=result_body))
    ).status == 200
    # After a lost answer, a client repeats the call and takes a 409 as proof that it was stored.
    assert (
        await answer_after_storage(gated_store, api("POST", f"{session}/events", json=result_body))
    ).status == 409


async def test_conflict_is_answered_only_after_conflicting_change_is_stored(
    api: ApiClient, gated_store: GatedStore
) -> None:
    stopped = await api.create_item_in_state("stopped")
    answers = [
        await answer_after_storage(gated_store, api.ack(stopped)),
        await answer_after_storage(gated_store, api.heartbeat(stopped)),
    ]
    if api.dialect == "anthropic":  # only this dialect answers a second stop with 409
        answers.append(
            await answer_after_storage(gated_store, api.stop(stopped, json={"force": True}))
        )
    # In the anthropic dialect, a heartbeat of a stopped item is answered 200 with its state.
    allowed = {200, 409} if api.dialect == "anthropic" else {409}
    assert {answer.status for answer in answers} == allowed
