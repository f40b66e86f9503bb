"""Answers leave only after their changes are stored, so that a kill -9 revokes nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import ENV, TOKEN, Answer, Api, until
from workpool.server import ControlPlane, MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    import aiohttp


class Gate(MemoryStore):
    """A store whose commits wait while the gate is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0

    async def durable(self) -> None:
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def api(gate: Gate, http: aiohttp.ClientSession, dialect: str) -> AsyncIterator[Api]:
    async with ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=gate) as plane:
        yield Api(plane, http, dialect)


async def held_back(gate: Gate, answer: Awaitable[Answer]) -> Answer:
    """Return the answer, which must not arrive before the gate is opened."""
    gate.gate.clear()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(_await(answer))
        async with asyncio.timeout(20):
            await until(lambda: gate.waiting or asking.done())
        assert not asking.done()
        gate.gate.set()
    return asking.result()


async def _await(answer: Awaitable[Answer]) -> Answer:
    return await answer


CALLS: dict[str, tuple[str, Callable[[Api, str], Awaitable[Answer]]]] = {
    "enqueue": ("queued", lambda api, _: api("POST", api.work())),
    "poll": ("queued", lambda api, _: api.poll()),
    "a poll that finds nothing": ("stopped", lambda api, _: api.poll()),
    "ack": ("queued", lambda api, work_id: api.ack(work_id)),
    "heartbeat": ("starting", lambda api, work_id: api.heartbeat(work_id)),
    "stop": ("active", lambda api, work_id: api.stop(work_id)),
    "update": ("active", lambda api, work_id: api.update(work_id, json={"metadata": {"a": "b"}})),
    "get": ("active", lambda api, work_id: api.get(work_id)),
    "list": ("active", lambda api, _: api("GET", api.work())),
    "stats": ("active", lambda api, _: api("GET", api.work("/stats"))),
}


@pytest.mark.parametrize("call", CALLS)
async def test_call_is_answered_only_after_its_change_is_stored(
    api: Api, gate: Gate, call: str
) -> None:
    state, ask = CALLS[call]
    work_id = await api.bring_to(state)
    assert (await held_back(gate, ask(api, work_id))).status in {200, 204}


async def test_session_and_events_are_returned_only_after_they_are_stored(
    api: Api, gate: Gate
) -> None:
    api.plane.enqueue(script=[{"name": "Bash", "input": {}}])
    [item] = (await api("GET", api.work())).body["data"]
    session = f"{api.base}/sessions/{item['data']['id']}"
    assert (await held_back(gate, api("GET", session))).status == 200
    listed = await held_back(gate, api("GET", f"{session}/events"))
    [use] = [event for event in listed.body["data"] if event["type"] == "agent.tool_use"]
    result_body = {
        "events": [{"type": "user.tool_result", "tool_use_id": use["id"], "content": []}]
    }
    assert (await held_back(gate, api("POST", f"{session}/events", json=result_body))).status == 200
    # A client that repeats the call after a lost answer takes a 409 as "stored".
    assert (await held_back(gate, api("POST", f"{session}/events", json=result_body))).status == 409


async def test_conflict_is_answered_only_after_its_cause_is_stored(api: Api, gate: Gate) -> None:
    stopped = await api.bring_to("stopped")
    answers = [
        await held_back(gate, api.ack(stopped)),
        await held_back(gate, api.heartbeat(stopped)),
    ]
    if api.dialect == "anthropic":  # the 409 to a second stop says that the first one was applied
        answers.append(await held_back(gate, api.stop(stopped, json={"force": True})))
    # A heartbeat in the anthropic dialect answers the state of a stopped item instead.
    allowed = {200, 409} if api.dialect == "anthropic" else {409}
    assert {answer.status for answer in answers} == allowed
