"""The SDK `qca-sdk` as a client of the control plane: the eight work calls, sessions, events."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from qca import AsyncManaged, ConflictError, Managed, NotFoundError
from qca.common import APIStatusError, AuthenticationError, BadRequestError, PermissionDeniedError

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN
from tests.protocol.sdk_item_calls import check_item_calls_of_sdk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient
    from workpool.server import ControlPlane


pytestmark = pytest.mark.trial


@pytest.fixture
async def sdk_client(control_plane: ControlPlane) -> AsyncIterator[AsyncManaged]:
    client = AsyncManaged(
        pat=TOKEN, base_url=control_plane.base_url, _strict_response_validation=True
    )
    async with client:
        yield client


async def test_qoder_sdk_can_list_send_and_stream_session_events(
    control_plane: ControlPlane, sdk_client: AsyncManaged
) -> None:
    events = sdk_client.sessions.events
    (item,) = control_plane.enqueue(script=[{"name": "Bash", "input": {"command": "ls"}}])
    listed = [event async for event in await events.list(item.session_id, limit=2)]
    assert [event.type for event in listed] == [
        "user.message",
        "session.status_running",
        "agent.tool_use",
    ]
    first, use = listed[0].id, listed[-1].id
    assert use is not None
    sent = await events.send(
        item.session_id, events=[{"type": "user.tool_result", "tool_use_id": use}]
    )
    assert sent.data is not None
    with pytest.raises(ConflictError):
        await events.send(
            item.session_id, events=[{"type": "user.tool_result", "tool_use_id": use}]
        )
    async with await events.stream(item.session_id, last_event_id=first) as stream:
        streamed = [await anext(aiter(stream)) for _ in range(5)]
    assert [event.type for event in streamed] == [
        "session.status_running",
        "agent.tool_use",
        "user.tool_result",
        "agent.message",
        "session.status_idle",
    ]


async def test_qoder_sdk_lists_events_by_type_time_and_order(
    control_plane: ControlPlane, sdk_client: AsyncManaged, clock: ManualClock
) -> None:
    events = sdk_client.sessions.events
    (item,) = control_plane.enqueue(script=[{"name": "Bash", "input": {"command": "ls"}}])
    since = datetime.fromtimestamp(clock.now, UTC)
    clock.advance(1)
    (use,) = [event async for event in await events.list(
        item.session_id, types=["agent.tool_use", "agent.message"])]  # fmt: skip
    assert use.id is not None
    await events.send(item.session_id, events=[{"type": "user.tool_result", "tool_use_id": use.id}])
    newest = await events.list(item.session_id, order="desc", limit=1, created_at_gt=since)
    assert [event.type async for event in newest] == [
        "session.status_idle",
        "agent.message",
        "user.tool_result",
    ]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("queued", "idle"),
        ("starting", "idle"),
        ("active", "running"),
        ("stopping", "canceling"),
        ("stopped", "idle"),
    ],
)
async def test_session_in_every_state_validates_as_type_of_qoder_sdk(
    qoder_api: ApiClient, sdk_client: AsyncManaged, state: str, status: str
) -> None:
    work_id = await qoder_api.create_item_in_state(state)
    session_id = (await qoder_api.get(work_id)).body["data"]["id"]
    session = await sdk_client.sessions.retrieve(session_id)
    assert (session.id, session.type, session.status) == (session_id, "session", status)
    assert (session.resources, session.vault_ids, session.outcome_evaluations) == ([], [], [])
    assert session.stats is not None
    assert session.usage is not None
    assert session.updated_at is not None
    agent = session.agent
    assert agent is not None
    assert (agent.skills, agent.tools, agent.mcp_servers) == ([], [], [])
    assert agent.model is not None


async def test_qoder_sdk_makes_all_eight_work_calls(
    control_plane: ControlPlane, sdk_client: AsyncManaged, clock: ManualClock
) -> None:
    work = sdk_client.environments.work
    assert await work.poll(ENV, worker_id="sdk") is None
    (created,) = control_plane.enqueue(metadata={"job": "report"})
    item = await work.poll(ENV, block_ms=999, reclaim_older_than_ms=0, worker_id="sdk")
    assert item is not None
    assert (item.id, item.state, item.metadata) == (created.id, "queued", {"job": "report"})
    assert item.data is not None
    assert (item.data.type, item.data.id) == ("session", created.session_id)

    await check_item_calls_of_sdk(work, created, clock)
    session = await sdk_client.sessions.retrieve(created.session_id)
    assert (session.id, session.status) == (created.session_id, "running")

    assert (await work.stop(created.id, environment_id=ENV)).state == "stopping"
    assert (await work.stop(created.id, environment_id=ENV, force=True)).state == "stopped"
    assert [one.id async for one in work.list(ENV)] == [created.id]


async def test_qoder_sdk_lists_items_to_the_end(
    control_plane: ControlPlane, sdk_client: AsyncManaged
) -> None:
    ids = [item.id for item in control_plane.enqueue(45)]
    assert [item.id async for item in sdk_client.environments.work.list(ENV, limit=10)] == ids
    backwards = [
        item.id
        async for item in sdk_client.environments.work.list(ENV, limit=10, before_id=ids[25])
    ]
    assert set(backwards) == set(ids[:25])
    assert len(backwards) == 25


async def test_error_responses_become_exceptions_of_qoder_sdk(
    control_plane: ControlPlane, sdk_client: AsyncManaged
) -> None:
    work = sdk_client.environments.work
    (item,) = control_plane.enqueue()
    with pytest.raises(NotFoundError):
        await work.retrieve("work_" + "0" * 32, environment_id=ENV)
    with pytest.raises(BadRequestError):
        await work.poll(CLOUD)
    with pytest.raises(BadRequestError):
        await work.poll(ENV, block_ms=1000)
    with pytest.raises(ConflictError):
        await work.heartbeat(item.id, environment_id=ENV)
    await work.ack(item.id, environment_id=ENV)
    with pytest.raises(APIStatusError) as error:
        await work.heartbeat(
            item.id, environment_id=ENV, expected_last_heartbeat="2026-03-01T12:00:00Z"
        )
    assert error.value.status_code == 412
    with pytest.raises(AuthenticationError):
        await sdk_client.with_options(pat="wrong").environments.work.poll(ENV)
    with pytest.raises(PermissionDeniedError):
        await sdk_client.with_options(pat=LIMITED).environments.work.poll(OTHER)


async def test_synchronous_qoder_sdk_stops_all_items(control_plane: ControlPlane) -> None:
    def stop_all_items() -> list[str]:
        seen: list[str] = []
        with Managed(pat=TOKEN, base_url=control_plane.base_url) as sdk:
            while (item := sdk.environments.work.poll(ENV, worker_id="sdk")) is not None:
                assert item.id is not None
                sdk.environments.work.ack(item.id, environment_id=ENV)
                sdk.environments.work.stop(item.id, environment_id=ENV, force=True)
                seen.append(item.id)
        return seen

    ids = [item.id for item in control_plane.enqueue(5)]
    assert await asyncio.to_thread(stop_all_items) == ids
