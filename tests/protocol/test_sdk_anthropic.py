"""The SDK `anthropic` as a client: the eight work calls, sessions, its poller and its worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from anthropic import (
    APIStatusError,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
)

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN, wait_until
from tests.protocol.sdk_item_calls import check_item_calls_of_sdk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.manual_clock import ManualClock
    from tests.protocol.conftest import ApiClient
    from workpool.server import ControlPlane


pytestmark = pytest.mark.trial


@pytest.fixture
async def sdk_client(control_plane: ControlPlane) -> AsyncIterator[AsyncAnthropic]:
    # The SDK appends /v1 to the base URL.
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")
    async with AsyncAnthropic(auth_token=TOKEN, base_url=base_url) as client:
        yield client


@pytest.fixture
async def client_with_strict_validation(
    control_plane: ControlPlane,
) -> AsyncIterator[AsyncAnthropic]:
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")
    async with AsyncAnthropic(
        auth_token=TOKEN, base_url=base_url, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
async def api_key_client(control_plane: ControlPlane) -> AsyncIterator[AsyncAnthropic]:
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")
    async with AsyncAnthropic(
        api_key=TOKEN, base_url=base_url, _strict_response_validation=True
    ) as client:
        yield client


async def test_anthropic_sdk_makes_all_eight_work_calls(
    control_plane: ControlPlane, client_with_strict_validation: AsyncAnthropic, clock: ManualClock
) -> None:
    sdk = client_with_strict_validation
    work = sdk.beta.environments.work
    assert await work.poll(ENV, anthropic_worker_id="sdk") is None
    (created,) = control_plane.enqueue(metadata={"job": "report"})
    item = await work.poll(ENV, block_ms=999, reclaim_older_than_ms=0, anthropic_worker_id="sdk")
    assert item is not None
    assert (item.id, item.state, item.metadata) == (created.id, "queued", {"job": "report"})
    assert item.data.id == created.session_id.replace("sess_", "session_")

    await check_item_calls_of_sdk(work, created, clock)

    # The SDK expects an item in the answer to a stop, but the service answers 204 without body.
    raw = sdk.beta.environments.work.with_raw_response
    assert (await raw.stop(created.id, environment_id=ENV)).http_response.status_code == 204
    assert (await work.retrieve(created.id, environment_id=ENV)).state == "stopping"
    await raw.stop(created.id, environment_id=ENV, force=True)
    assert [one.state async for one in work.list(ENV)] == ["stopped"]


async def test_anthropic_sdk_lists_items_to_the_end(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic
) -> None:
    ids = [item.id for item in control_plane.enqueue(45)]
    assert [item.id async for item in sdk_client.beta.environments.work.list(ENV, limit=10)] == ids


async def test_work_poller_of_anthropic_sdk_claims_every_enqueued_item(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [item.id for item in control_plane.enqueue(50)]
    claimed = []
    poller = sdk_client.beta.environments.work.poller(
        environment_id=ENV, environment_key=TOKEN, block_ms=None, drain=True, auto_stop=True
    )
    async for item in poller:
        claimed.append(item.id)
        assert (
            await sdk_client.beta.environments.work.heartbeat(item.id, environment_id=ENV)
        ).state == ("active")
    assert claimed == ids
    # The poller sends one graceful stop for each item, and the item becomes `stopping`. A second
    # stop, or the end of the lease, makes the item `stopped`.
    states = [item.state async for item in sdk_client.beta.environments.work.list(ENV)]
    assert states == ["stopping"] * 50
    assert control_plane.summary().overlapping == 0
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("state", ["queued", "starting", "active", "stopping", "stopped"])
async def test_session_in_every_state_validates_as_type_of_anthropic_sdk(
    anthropic_api: ApiClient, client_with_strict_validation: AsyncAnthropic, state: str
) -> None:
    work_id = await anthropic_api.create_item_in_state(state)
    session_id = (await anthropic_api.get(work_id)).body["data"]["id"]
    session = await client_with_strict_validation.beta.sessions.retrieve(session_id)
    assert session.id == session_id
    assert session.status == ("running" if state in {"active", "stopping"} else "idle")
    assert (session.resources, session.vault_ids, session.outcome_evaluations) == ([], [], [])
    assert session.usage.output_tokens == 0
    assert session.updated_at >= session.created_at
    agent = session.agent
    assert (agent.skills, agent.tools, agent.mcp_servers) == ([], [], [])
    assert agent.execution_identity.type == "service_account"


@pytest.mark.parametrize("status", ["running", "idle", "terminated"])
async def test_session_of_each_status_passes_strict_validation_of_anthropic_sdk(
    control_plane: ControlPlane, client_with_strict_validation: AsyncAnthropic, status: str
) -> None:
    (item,) = control_plane.enqueue()
    control_plane.emit(
        item.session_id, {"type": f"session.status_{status}", "stop_reason": {"type": "end_turn"}}
    )
    session_id = item.session_id.replace("sess_", "session_")
    assert (await client_with_strict_validation.beta.sessions.retrieve(session_id)).status == status


async def test_application_with_anthropic_sdk_creates_and_archives_sessions(
    client_with_strict_validation: AsyncAnthropic, api_key_client: AsyncAnthropic
) -> None:
    environment = await api_key_client.beta.environments.create(
        name="mine", config={"type": "self_hosted"}, metadata={"team": "a"}
    )
    assert await api_key_client.beta.environments.retrieve(environment.id) == environment
    assert environment in [each async for each in api_key_client.beta.environments.list(limit=1)]
    session = await api_key_client.beta.sessions.create(
        agent={"type": "agent", "id": "agent_1", "version": 2},
        environment_id=environment.id,
        title="report",
        metadata={"job": "report"},
        initial_events=[{"type": "user.message", "content": [{"type": "text", "text": "hello"}]}],
    )
    assert (session.agent.id, session.agent.version, session.title) == ("agent_1", 2, "report")
    item = await client_with_strict_validation.beta.environments.work.poll(environment.id)
    assert item is not None
    assert (item.data.id, item.metadata) == (session.id, {"job": "report"})
    another = await api_key_client.beta.sessions.create(
        agent="agent_1", environment_id=environment.id
    )
    listed = [
        each.id async for each in api_key_client.beta.sessions.list(limit=1, statuses=["idle"])
    ]
    assert listed == [another.id, session.id]
    archived = await api_key_client.beta.sessions.archive(session.id)
    assert archived.status == "terminated"
    assert archived.archived_at is not None
    assert [each.id async for each in api_key_client.beta.sessions.list()] == [another.id]


async def test_worker_of_anthropic_sdk_completes_scripted_sessions(
    control_plane: ControlPlane,
    sdk_client: AsyncAnthropic,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = [
        {"name": "write", "input": {"file_path": "note", "content": "hello\n"}},
        {"name": "bash", "input": {"command": "cat note; echo world >>note"}},
        {"name": "read", "input": {"file_path": "note"}},
    ]
    items = control_plane.enqueue(2, script=script)
    worker = sdk_client.beta.environments.work.worker(
        environment_id=ENV, environment_key=TOKEN, workdir=tmp_path, max_idle=0.05
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.run())
        await wait_until(lambda: control_plane.summary().stopped == len(items))
        running.cancel()
    assert (tmp_path / "note").read_text() == "hello\nworld\n"
    for item in items:
        stored = control_plane.events(item.session_id)
        results = [event for event in stored if event["type"] == "user.tool_result"]
        assert [result["is_error"] for result in results] == [False] * len(script)
        assert results[1]["content"][0]["text"].strip() == "hello"
        assert stored[-1]["stop_reason"] == {"type": "end_turn"}
    assert control_plane.summary().overlapping == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_error_responses_become_exceptions_of_anthropic_sdk(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic
) -> None:
    work = sdk_client.with_options(max_retries=0).beta.environments.work
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
    assert type(error.value).__name__ == "BetaHeartbeatPreconditionFailedError"
    await work.with_raw_response.stop(item.id, environment_id=ENV, force=True)
    with pytest.raises(ConflictError):
        await work.stop(item.id, environment_id=ENV, force=True)
    wrong = sdk_client.with_options(auth_token="wrong")  # noqa: S106 - it opens nothing
    with pytest.raises(AuthenticationError):
        await wrong.beta.environments.work.poll(ENV)
    with pytest.raises(PermissionDeniedError):
        await sdk_client.with_options(auth_token=LIMITED).beta.environments.work.poll(OTHER)
