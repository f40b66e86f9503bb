"""The SDK `anthropic` reads, sends and streams the events of sessions."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import pytest
from anthropic import AsyncAnthropic, BadRequestError, ConflictError, beta_async_tool
from anthropic.lib.tools import ToolError
from anthropic.lib.tools._beta_session_runner import SessionToolRunner

from tests.protocol.conftest import TOKEN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from anthropic import AsyncStream
    from anthropic.types.beta.sessions import BetaManagedAgentsStreamSessionEvents

    from tests.manual_clock import ManualClock
    from workpool.server import ControlPlane

pytestmark = pytest.mark.trial

BASH: dict[str, Any] = {"name": "bash", "input": {"command": "ls"}}
ASK = {**BASH, "permission": "ask"}


@pytest.fixture
async def sdk_client(control_plane: ControlPlane) -> AsyncIterator[AsyncAnthropic]:
    base_url = control_plane.anthropic_base_url.removesuffix("/v1")
    async with AsyncAnthropic(
        auth_token=TOKEN, base_url=base_url, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


def create_scripted_session(plane: ControlPlane, *script: dict[str, Any]) -> str:
    (item,) = plane.enqueue(script=script)
    return item.session_id.replace("sess_", "session_")


async def test_anthropic_sdk_can_list_send_and_stream_session_events(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic
) -> None:
    events = sdk_client.beta.sessions.events
    session_id = create_scripted_session(control_plane, BASH, ASK)
    listed = [event async for event in events.list(session_id, limit=2)]
    assert [event.type for event in listed] == [
        "user.message",
        "session.status_running",
        "agent.tool_use",
    ]
    async with await events.stream(session_id) as stream:
        use = listed[-1]
        assert use.type == "agent.tool_use"
        assert (use.name, use.input) == ("bash", {"command": "ls"})
        answered = await events.send(
            session_id,
            events=[{"type": "user.tool_result", "tool_use_id": use.id, "is_error": False,
                     "content": [{"type": "text", "text": "a b"}]}],
        )  # fmt: skip
        assert answered.data is not None
        assert [event.type for event in answered.data] == ["user.tool_result"]
        streamed = [await anext(aiter(stream)) for _ in range(3)]
        assert [event.type for event in streamed] == [
            "user.tool_result",
            "agent.tool_use",
            "session.status_idle",
        ]
        idle = streamed[-1]
        assert idle.type == "session.status_idle"
        assert idle.stop_reason.type == "requires_action"
        (waits,) = idle.stop_reason.event_ids
        await events.send(
            session_id,
            events=[{"type": "user.tool_confirmation", "tool_use_id": waits, "result": "deny"}],
        )
        streamed = [await anext(aiter(stream)) for _ in range(5)]
        assert streamed[1].type == "agent.tool_result"
        assert streamed[-1].type == "session.status_idle"
        assert streamed[-1].stop_reason.type == "end_turn"


async def test_anthropic_sdk_lists_events_by_type_time_and_order(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic, clock: ManualClock
) -> None:
    session_id = create_scripted_session(control_plane, BASH)
    since = clock.now
    clock.advance(1)
    (use,) = [event async for event in sdk_client.beta.sessions.events.list(
        session_id, types=["agent.tool_use", "agent.message"])]  # fmt: skip
    result: Any = {"type": "user.tool_result", "tool_use_id": use.id}
    await sdk_client.beta.sessions.events.send(session_id, events=[result])
    listed = sdk_client.beta.sessions.events.list(
        session_id, order="desc", limit=1, created_at_gt=datetime.fromtimestamp(since, UTC)
    )
    assert [event.type async for event in listed] == [
        "session.status_idle",
        "agent.message",
        "user.tool_result",
    ]


async def test_refused_events_become_exceptions_of_anthropic_sdk(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic
) -> None:
    events = sdk_client.beta.sessions.events
    session_id = create_scripted_session(control_plane, BASH)
    use = [event async for event in events.list(session_id)][-1]
    await events.send(session_id, events=[{"type": "user.tool_result", "tool_use_id": use.id}])
    with pytest.raises(ConflictError):
        await events.send(session_id, events=[{"type": "user.tool_result", "tool_use_id": use.id}])
    with pytest.raises(BadRequestError):
        await events.send(session_id, events=[{"type": "user.tool_result", "tool_use_id": "evt_1"}])


async def confirm_first_and_deny_second_tool_use(
    sdk: AsyncAnthropic,
    session_id: str,
    stream: AsyncStream[BetaManagedAgentsStreamSessionEvents],
) -> None:
    """Allow the first tool use that asks for a confirmation, and deny the second one."""
    verdicts: list[Literal["allow", "deny"]] = ["allow", "deny"]
    async with stream:
        async for event in stream:
            if event.type == "agent.tool_use" and event.evaluated_permission == "ask":
                await sdk.beta.sessions.events.send(
                    session_id,
                    events=[{"type": "user.tool_confirmation", "tool_use_id": event.id,
                             "result": verdicts.pop(0)}],
                )  # fmt: skip
            if event.type == "agent.message":
                return


async def test_tool_runner_of_anthropic_sdk_answers_every_tool_use_of_scripted_session(
    control_plane: ControlPlane, sdk_client: AsyncAnthropic
) -> None:
    """The SDK's tool runner reads one event stream, and sends one result for each tool use."""

    @beta_async_tool
    async def bash(command: str) -> str:
        """Run a command.

        Args:
            command: What to run.
        """
        if command == "fail":
            raise ToolError("it failed")
        return f"ran {command}"

    @beta_async_tool
    async def weather(city: str) -> str:
        """Return the weather.

        Args:
            city: Where.
        """
        return f"rain in {city}"

    script = [
        BASH,
        {"name": "weather", "input": {"city": "Ulm"}, "custom": True},
        {"name": "bash", "input": {"command": "fail"}},
        ASK,
        {**BASH, "permission": "deny"},
        ASK,
    ]
    session_id = create_scripted_session(control_plane, *script)
    runner = SessionToolRunner(sdk_client, session_id, tools=[bash, weather], max_idle=0.05)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        stream = await sdk_client.beta.sessions.events.stream(session_id)
        group.create_task(confirm_first_and_deny_second_tool_use(sdk_client, session_id, stream))
        calls = [
            (call.name, call.is_error, call.posted, call.confirmation) async for call in runner
        ]
    assert calls == [
        ("bash", False, True, None),
        ("weather", False, True, None),
        ("bash", True, True, None),
        ("bash", False, True, "allow"),
        ("bash", False, False, "deny"),
        ("bash", False, False, "deny"),
    ]
    streamed = control_plane.events(session_id.replace("session_", "sess_"))
    assert streamed[-1]["stop_reason"] == {"type": "end_turn"}
    texts = [
        event["content"][0]["text"] for event in streamed if event["type"] == "user.tool_result"
    ]
    assert texts == ["ran ls", "it failed", "ran ls"]
