"""Listing, sending and following events of a session, over sockets that may break."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
import pytest

from workpool.errors import ConflictError, ControlPlaneError, RefusedError, TransientError
from workpool.secret import Secret
from workpool.testing import Cut, Faults, Hold, Proxy, literal, lost, reset, status
from workpool.wire import endpoints
from workpool.wire.client import WorkClient
from workpool.wire.events import event_stream
from workpool.wire.events.event_calls import PermissiveSessionGuard
from workpool.wire.http.call_options import DEFAULT_OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing.fault_rules import Request
    from workpool.wire.events.event_calls import SessionEvent
    from workpool.wire.events.event_stream import EventStream
    from workpool.wire.http.call_options import CallOptions

T = TypeVar("T")

BASH: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}}
MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}


@pytest.fixture(autouse=True)
def shorten_stream_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(event_stream, "BACKOFF_CAP_SECONDS", 0.05)


@pytest.fixture(params=["qoder", "anthropic"])
async def client(
    request: pytest.FixtureRequest,
    control_plane: ControlPlane,
    make_settings: Callable[..., Settings],
) -> AsyncIterator[WorkClient]:
    dialect = request.param
    url = control_plane.base_url if dialect == "qoder" else control_plane.anthropic_base_url
    async with WorkClient(make_settings(dialect=dialect, base_url=url)) as client:
        yield client


@pytest.fixture
async def qoder_dialect_client(make_settings: Callable[..., Settings]) -> AsyncIterator[WorkClient]:
    async with WorkClient(make_settings()) as client:
        yield client


def create_session(plane: ControlPlane, *script: dict[str, Any]) -> str:
    return plane.enqueue(script=script)[0].session_id


def event_ids(events: Sequence[SessionEvent]) -> list[str]:
    return [event["id"] for event in events]


def tool_result(use: SessionEvent, text: str = "done") -> dict[str, Any]:
    return {
        "type": "user.tool_result",
        "tool_use_id": use["id"],
        "content": [{"type": "text", "text": text}],
        "is_error": False,
    }


def last_tool_use(plane: ControlPlane, session_id: str) -> SessionEvent:
    return [event for event in plane.events(session_id) if event["type"] == "agent.tool_use"][-1]


async def read_events(stream: EventStream, count: int) -> list[SessionEvent]:
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


def append_events(plane: ControlPlane, session_id: str, count: int) -> list[str]:
    """Append `count` events to the session; return the ids of all its events."""
    for number in range(count):
        plane.emit(session_id, {"type": "agent.thinking", "number": number})
    return event_ids(plane.events(session_id))


async def test_event_list_returns_whole_history(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    session_id = create_session(control_plane)
    events_said = append_events(control_plane, session_id, 250)
    events = [event async for event in client.events(session_id).list()]
    assert event_ids(events) == events_said
    assert events == list(control_plane.events(session_id))


async def test_event_page_that_is_too_large_is_requested_in_smaller_pages(
    control_plane: ControlPlane,
    qoder_dialect_client: WorkClient,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "EVENTS", replace(endpoints.EVENTS, limit=20_000))
    session_id = create_session(control_plane)
    for _ in range(30):
        control_plane.emit(session_id, {"type": "agent.thinking", "text": "x" * 5_000})
    events = [event async for event in qoder_dialect_client.events(session_id).list()]
    assert event_ids(events) == event_ids(control_plane.events(session_id))
    assert {request.query["limit"] for request in faults.of("events")} == {"100", "10", "1"}


async def test_event_list_without_has_more_field_is_read_until_no_next_page_follows(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    bodies = [
        b'{"data": [{"id": "evt_1", "type": "x"}], "next_page": "a"}',
        b'{"data": [], "next_page": "b"}',
        b'{"data": [{"id": "evt_2", "type": "x"}], "next_page": null}',
    ]
    for number, body in enumerate(bodies):
        faults.add(literal(body), "events", skip=number, times=1)
    events = [
        event async for event in qoder_dialect_client.events(create_session(control_plane)).list()
    ]
    assert event_ids(events) == ["evt_1", "evt_2"]


async def test_event_list_with_repeated_page_token_raises_transient_error(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    body = b'{"data": [], "has_more": true, "next_page": "same"}'
    faults.add(literal(body), "events")
    with pytest.raises(TransientError, match="repeat"):
        [event async for event in qoder_dialect_client.events(create_session(control_plane)).list()]


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b'{"data": {}}', b'{"data": [1]}', b'{"data": [{"type": "x"}]}',
     b'{"data": [{"id": "a/b", "type": "x"}]}', b'{"data": [{"id": "evt_1", "type": 1}]}',
     b'{"data": [], "next_page": 1}'],
)  # fmt: skip
async def test_event_list_with_malformed_page_raises_transient_error_about_bad_body(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults, body: bytes
) -> None:
    faults.add(literal(body), "events")
    with pytest.raises(TransientError) as caught:
        [event async for event in qoder_dialect_client.events(create_session(control_plane)).list()]
    assert caught.value.reason == "bad_body"


async def test_call_that_sends_events_returns_them_as_stored_by_control_plane(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    session_id = create_session(control_plane, BASH)
    use = last_tool_use(control_plane, session_id)
    stored = await client.events(session_id).send(MESSAGE, tool_result(use))
    assert list(stored) == list(control_plane.events(session_id)[3:5])


async def test_sending_invalid_event_raises_error_and_stores_nothing(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    session_id = create_session(control_plane, BASH)
    events = client.events(session_id)
    with pytest.raises(RefusedError) as refused:
        await events.send({"type": "agent.message"})
    assert (refused.value.op, refused.value.status) == ("events", 400)
    with pytest.raises(RefusedError):
        await client.events("sess_" + "0" * 32).send(MESSAGE)
    with pytest.raises(TypeError):
        await events.send({**MESSAGE, "content": object()})
    with pytest.raises(TypeError):
        await events.send({"type": "user.message", "content": "\ud800"})
    with pytest.raises(ValueError, match="session_id"):
        client.events("../work")
    assert len(control_plane.events(session_id)) == 3


async def test_tool_result_sent_again_after_lost_answer_counts_as_sent(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane, BASH)
    use = last_tool_use(control_plane, session_id)
    faults.add(lost(applied=True), "send", times=1)
    with pytest.raises(TransientError):
        await client.events(session_id).send(tool_result(use))
    (stored,) = await client.events(session_id).send(tool_result(use))
    assert stored == control_plane.events(session_id)[3]


@pytest.mark.parametrize(
    "other",
    [{"content": [{"type": "text", "text": "else"}]}, {"is_error": True}, {"content": []},
     {"content": [{"type": "text", "text": "done"}, {"type": "text", "text": "done"}]}],
)  # fmt: skip
async def test_second_tool_result_with_different_content_raises_conflict(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, other: dict[str, Any]
) -> None:
    session_id = create_session(control_plane, BASH)
    use = last_tool_use(control_plane, session_id)
    await qoder_dialect_client.events(session_id).send(tool_result(use))
    with pytest.raises(ConflictError):
        await qoder_dialect_client.events(session_id).send({**tool_result(use), **other})


async def test_repeated_tool_confirmation_is_accepted_but_contrary_confirmation_raises_conflict(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    session_id = create_session(control_plane, {**BASH, "permission": "ask"})
    verdict = {
        "type": "user.tool_confirmation",
        "tool_use_id": last_tool_use(control_plane, session_id)["id"],
        "result": "allow",
    }
    first = await qoder_dialect_client.events(session_id).send(verdict)
    assert await qoder_dialect_client.events(session_id).send(verdict) == first
    with pytest.raises(ConflictError):
        await qoder_dialect_client.events(session_id).send({**verdict, "result": "deny"})


async def test_message_sent_again_after_end_of_session_raises_conflict(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    session_id = create_session(control_plane)
    await qoder_dialect_client.events(session_id).send(MESSAGE)
    control_plane.emit(session_id, {"type": "session.status_terminated"})
    with pytest.raises(ConflictError):
        await qoder_dialect_client.events(session_id).send(MESSAGE)


class GuardThatRepeatsDelayedCall(PermissiveSessionGuard):
    """A call guard that cancels a call whose answer is delayed, and then repeats the call.

    Args:
        hold: The fault that delays the answer. The call is cancelled once the fault holds it.
    """

    def __init__(self, hold: Hold) -> None:
        self._hold = hold

    async def run_write_call(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
                giving_up = group.create_task(
                    self._expire_timeout_after_request_is_held(limit, self._hold.held + 1)
                )
                result = await call(DEFAULT_OPTIONS)
                giving_up.cancel()
                return result
        return await call(DEFAULT_OPTIONS)

    async def _expire_timeout_after_request_is_held(
        self, limit: asyncio.Timeout, held: int
    ) -> None:
        await self._hold.reached(held)
        limit.reschedule(asyncio.get_running_loop().time())


async def test_tool_result_without_answer_is_sent_again_but_message_is_not(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane, BASH)
    hold = Hold(applied=True)
    faults.add(hold, "send", times=2)
    events = qoder_dialect_client.events(session_id, guard=GuardThatRepeatsDelayedCall(hold))
    with pytest.raises(TransientError) as caught:
        await events.send(MESSAGE)
    assert caught.value.reason == "timeout"
    assert len(faults.of("send")) == 1
    (stored,) = await events.send(tool_result(last_tool_use(control_plane, session_id)))
    assert len(faults.of("send")) == 3
    assert [event["type"] for event in control_plane.events(session_id)[3:5]] == [
        "user.message",
        "user.tool_result",
    ]
    assert stored == control_plane.events(session_id)[4]
    hold.release()


async def test_client_never_renews_token_that_caller_passed_to_events_method(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    refreshed: list[str] = []
    client.on_credential_refresh = refreshed.append
    events = client.events(create_session(control_plane), token=Secret("-".join(("not", "known"))))
    with pytest.raises(RefusedError) as refused:
        await events.send(MESSAGE)
    assert (refused.value.status, len(faults.of("send"))) == (401, 1)
    async with events.stream() as stream:
        with pytest.raises(RefusedError):
            await anext(stream)
    assert refreshed == []
    assert (await client.stats()).depth == 1


async def test_stream_returns_history_before_live_events(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    session_id = create_session(control_plane)
    events_said = append_events(control_plane, session_id, 120)
    async with client.events(session_id).stream() as stream:
        caught_up = []
        for expected in events_said:
            assert (await anext(stream))["id"] == expected
            caught_up.append(stream.caught_up)
        assert caught_up == [False] * (len(events_said) - 1) + [True]
        for _ in range(3):
            control_plane.emit(session_id, {"type": "agent.thinking"})
            assert await read_events(stream, 1) == list(control_plane.events(session_id)[-1:])
            assert stream.caught_up


async def test_stream_counts_first_event_as_live_if_session_has_no_history(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    (item,) = control_plane.enqueue()
    async with client.events(item.session_id).stream() as stream:
        control_plane.emit(item.session_id, {"type": "agent.thinking"})
        await read_events(stream, 1)
        assert stream.caught_up


async def test_stream_loses_no_event_appended_before_its_history_is_read(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane)
    hold = Hold()
    faults.add(hold, "events", times=1)
    async with client.events(session_id).stream() as stream, asyncio.TaskGroup() as group:
        reader = group.create_task(read_events(stream, 9))
        # The events are appended after the stream was opened and before its history is read.
        await hold.reached()
        append_events(control_plane, session_id, 3)
        hold.release()
        await faults.wait_for("events", answered=True)
        append_events(control_plane, session_id, 2)
    assert event_ids(reader.result()) == event_ids(control_plane.events(session_id))


async def test_event_stream_is_opened_before_event_history_is_read(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    async with qoder_dialect_client.events(create_session(control_plane)).stream() as stream:
        await read_events(stream, 4)
    assert [request.op for request in faults.seen] == ["stream", "events"]


async def test_cancelled_wait_for_event_loses_no_event(
    control_plane: ControlPlane, client: WorkClient
) -> None:
    """A cancelled wait loses nothing: the next wait continues at the same event."""
    session_id = create_session(control_plane)
    seen: list[SessionEvent] = []
    seconds = 0.0
    async with client.events(session_id).stream() as stream, asyncio.timeout(20):
        while len(seen) < 30:
            seconds = 0.0 if seconds > 0.02 else seconds + 0.0007
            try:
                async with asyncio.timeout(seconds):
                    seen.append(await anext(stream))
            except TimeoutError:
                if len(control_plane.events(session_id)) < 30:
                    append_events(control_plane, session_id, 1)
    assert event_ids(seen) == event_ids(control_plane.events(session_id))


async def test_broken_event_streams_neither_lose_nor_repeat_events(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane)
    cut = Cut()
    faults.add(cut, "stream")
    faults.add(status(503), "stream", probability=0.2)
    faults.add(reset(), "events", probability=0.2)
    async with client.events(session_id).stream() as stream, asyncio.TaskGroup() as group:
        reader = group.create_task(read_events(stream, 64))
        for number in range(20):
            await faults.wait_for("stream", count=number // 2 + 1)
            append_events(control_plane, session_id, 3)
            if number % 2:
                cut.now()
    assert len(faults.of("stream")) >= 10
    assert event_ids(reader.result()) == event_ids(control_plane.events(session_id))


async def test_stream_counts_events_that_it_missed_while_broken_as_history(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane)
    cut = Cut()
    faults.add(cut, "stream")
    async with client.events(session_id).stream() as stream:
        (*_, last) = await read_events(stream, 4)
        assert stream.caught_up
        hold = Hold()
        faults.add(hold, "stream", times=1)
        assert cut.now() == 1
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(anext(stream))
            await hold.reached()
            append_events(control_plane, session_id, 3)
            hold.release()
        flags = [stream.caught_up]
        for _ in range(2):
            await read_events(stream, 1)
            flags.append(stream.caught_up)
        assert flags == [False, False, True]
        assert reader.result()["id"] == event_ids(control_plane.events(session_id))[4]
    if client.events(session_id)._calls.resumes:
        assert faults.of("events")[-1].query["after_id"] == last["id"]


async def test_stream_that_receives_nothing_is_reopened(
    control_plane: ControlPlane, make_settings: Callable[..., Settings]
) -> None:
    session_id = create_session(control_plane)
    async with (
        Proxy(control_plane.base_url) as way,
        WorkClient(make_settings(base_url=way.base_url)) as client,
        client.events(session_id).stream(stall_seconds=0.1) as stream,
    ):
        await read_events(stream, 4)
        # The partition drops bytes silently, so the client must notice the missing keep-alives.
        way.partition()
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(read_events(stream, 1))
            append_events(control_plane, session_id, 1)
            await asyncio.to_thread(lambda: None)
            way.heal()
        assert event_ids(reader.result()) == event_ids(control_plane.events(session_id))[4:]


async def test_stream_without_keep_alives_is_reopened(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane)
    async with qoder_dialect_client.events(session_id).stream(stall_seconds=0.05) as stream:
        await read_events(stream, 4)
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(read_events(stream, 1))
            await faults.wait_for("stream", count=3)
            append_events(control_plane, session_id, 1)
        assert event_ids(reader.result()) == event_ids(control_plane.events(session_id))[4:]
    assert faults.of("stream")[-1].status is None


@pytest.mark.parametrize("code", [400, 401, 403, 404])
async def test_stream_request_with_client_error_status_raises_refused_error(
    control_plane: ControlPlane, client: WorkClient, faults: Faults, code: int
) -> None:
    faults.add(status(code), "stream")
    async with client.events(create_session(control_plane)).stream() as stream:
        with pytest.raises(RefusedError) as refused:
            await anext(stream)
    assert (refused.value.op, refused.value.status) == ("stream", code)


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 503])
async def test_transient_stream_error_is_retried(
    control_plane: ControlPlane, client: WorkClient, faults: Faults, code: int
) -> None:
    for op in ("stream", "events"):
        faults.add(status(code), op, times=2)
    async with client.events(create_session(control_plane)).stream() as stream:
        assert len(await read_events(stream, 4)) == 4
    assert len(faults.of("stream")) == 5


PAGE = b"<html>busy</html>"


@pytest.mark.parametrize(
    "frames",
    [
        b"data: {\n\n",
        b"data: []\n\n",
        b'event: error\ndata: {"type": "error"}\n\n',
        b'data: {"id": 1, "type": "x"}\n\n',
        b'data: {"id": "evt_1"}\n\n',
        None,
    ],
)
async def test_stream_with_malformed_frames_is_reopened(
    control_plane: ControlPlane,
    qoder_dialect_client: WorkClient,
    faults: Faults,
    frames: bytes | None,
) -> None:
    headers = {"Content-Type": "text/html" if frames is None else "text/event-stream"}
    faults.add(literal(frames or PAGE, headers=headers), "stream", times=2)
    session_id = create_session(control_plane)
    async with qoder_dialect_client.events(session_id).stream() as stream:
        assert event_ids(await read_events(stream, 4)) == event_ids(
            control_plane.events(session_id)
        )
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(read_events(stream, 1))
            await faults.wait_for("stream", count=3)
            append_events(control_plane, session_id, 1)
        assert event_ids(reader.result()) == event_ids(control_plane.events(session_id))[4:]


async def test_stream_ignores_frames_that_contain_no_event(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient, faults: Faults
) -> None:
    session_id = create_session(control_plane)
    events_said = control_plane.events(session_id)
    event = {"id": "evt_live", "type": "agent.thinking"}
    body = b'event: ping\ndata: {"type": "ping"}\n\n: alive\n\n' + b"".join(
        b"data: " + orjson.dumps(each) + b"\n\n" for each in (*events_said, event, event)
    )
    faults.add(literal(body, headers={"Content-Type": "text/event-stream"}), "stream", times=1)
    async with qoder_dialect_client.events(session_id).stream() as stream:
        assert await read_events(stream, 5) == [*events_said, event]


@pytest.mark.parametrize("kind", ["session.status_terminated", "session.deleted"])
async def test_event_stream_ends_after_event_about_termination_or_deletion_of_session(
    control_plane: ControlPlane, client: WorkClient, kind: str
) -> None:
    session_id = create_session(control_plane)
    control_plane.emit(session_id, {"type": kind})
    async with client.events(session_id).stream() as stream, asyncio.timeout(10):
        types = [event["type"] async for event in stream]
        assert types[-1] == kind
        assert [event async for event in stream] == []


async def test_stream_used_outside_async_with_raises_runtime_error(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    stream = qoder_dialect_client.events(create_session(control_plane)).stream()
    with pytest.raises(RuntimeError, match="async with"):
        await anext(stream)
    async with stream:
        await read_events(stream, 1)
    await read_events(stream, 3)  # These events were received before the stream was closed.
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_many_open_streams_do_not_delay_other_calls(
    control_plane: ControlPlane, qoder_dialect_client: WorkClient
) -> None:
    """The client has fewer connections for other calls than the 40 streams of this test."""
    session_id = create_session(control_plane)
    streams = [qoder_dialect_client.events(session_id).stream() for _ in range(40)]
    try:
        for stream in streams:
            await stream.__aenter__()
            await read_events(stream, 4)
        async with asyncio.timeout(30):
            await qoder_dialect_client.stats()
    finally:
        for stream in streams:
            await stream.__aexit__(None, None, None)


async def test_stream_request_has_headers_of_its_dialect(
    control_plane: ControlPlane, client: WorkClient, faults: Faults
) -> None:
    asked: list[Mapping[str, str]] = []

    def record_request_headers(request: Request) -> bool:
        asked.append(request.headers)
        return False

    cut = Cut()
    faults.add(cut, "stream")
    faults.add(status(500), "stream", "events", "send", where=record_request_headers)
    session_id = create_session(control_plane)
    events = client.events(session_id)
    async with events.stream() as stream:
        (*_, last) = await read_events(stream, 4)
        cut.now()
        control_plane.emit(session_id, {"type": "agent.thinking"})
        await read_events(stream, 1)
    await events.send(MESSAGE)
    for headers in asked:
        assert headers["Authorization"] == f"Bearer {control_plane.token}"
        assert headers["Accept-Encoding"] == "identity"
        if not client.events("sess_1")._calls.resumes:
            assert headers["anthropic-version"] == "2023-06-01"
            assert headers["anthropic-beta"] == "managed-agents-2026-04-01"
    accepts = ["text/event-stream", "application/json"]
    assert [headers["Accept"] for headers in asked] == [*accepts, *accepts, "application/json"]
    resumed = [headers.get("Last-Event-ID") for headers in asked]
    assert resumed == [None, None, last["id"], None, None]


async def test_on_request_callback_receives_operation_and_status_of_event_requests(
    control_plane: ControlPlane, make_settings: Callable[..., Settings], faults: Faults
) -> None:
    reported: list[tuple[str, str]] = []
    client = WorkClient(make_settings())
    client.on_request = lambda op, code, _: reported.append((op, code))
    faults.add(status(404), "stream", times=1)
    async with client:
        events = client.events(create_session(control_plane))
        async with events.stream() as stream:
            with pytest.raises(RefusedError):
                await read_events(stream, 1)
            await read_events(stream, 1)
        await events.send(MESSAGE)
    assert reported == [("stream", "404"), ("stream", "2xx"), ("events", "2xx"), ("events", "2xx")]


async def test_reading_and_sending_events_waits_for_rate_limits_of_client(
    control_plane: ControlPlane, make_settings: Callable[..., Settings]
) -> None:
    waits: list[str] = []
    client = WorkClient(make_settings(read_rate=2, write_rate=2))
    client.on_rate_limit_wait = lambda kind, _: waits.append(kind)
    async with client:
        events = client.events(create_session(control_plane))
        async with events.stream() as stream:
            await read_events(stream, 1)
        await events.send(MESSAGE)
        await events.send(MESSAGE)
    assert waits == ["read", "write"]


async def test_stream_after_token_rotation_uses_renewed_token(
    control_plane: ControlPlane,
    make_settings: Callable[..., Settings],
    tmp_path: Any,
) -> None:
    file = tmp_path / "token"
    file.write_text("stale")
    async with WorkClient(make_settings(token_file=file)) as client:
        file.write_text(control_plane.token)
        async with client.events(create_session(control_plane)).stream() as stream:
            assert len(await read_events(stream, 4)) == 4


async def test_event_stream_waits_but_sending_event_fails_if_control_plane_is_unreachable(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(base_url="http://127.0.0.1:1/api")
    async with WorkClient(settings) as client, client.events("sess_1").stream() as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(stream)
        with pytest.raises(ControlPlaneError):
            await client.events("sess_1").send(MESSAGE)
