"""`session.events`: a handler reads and sends events of its session while it holds the lease."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from workpool import LeaseLost, Session, SessionEnded, handler
from workpool.errors import ConflictError, TransientError
from workpool.events import SessionFinished
from workpool.handlers import find_handler_rule
from workpool.pool import item_requests
from workpool.server import DEFAULT_ENVIRONMENT, ControlPlane
from workpool.testing import Faults, Hold, expire_lease, lost, reset, status
from workpool.wire.events import event_stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from workpool.testing import Recorder
    from workpool.wire.events.event_stream import EventStream

BASH: dict[str, Any] = {"name": "Bash", "input": {"command": "ls"}}
MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}
SESSIONS_TOKEN = "-".join(("sessions", "token", "of", "one", "item"))


def tool_result_event(use: Mapping[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": f"ran {use['input']['command']}"}]
    return {"type": "user.tool_result", "tool_use_id": use["id"], "content": content}


async def answer_all_tool_uses(session: Session) -> dict[str, str]:
    """Send a result for each tool use that has none, until the turn of the agent ends."""
    uses: dict[str, Mapping[str, Any]] = {}
    answered = 0
    async with session.events.stream() as stream:
        async for event in stream:
            if event["type"] == "agent.tool_use":
                uses[event["id"]] = event
            elif event["type"] == "user.tool_result":
                uses.pop(event["tool_use_id"], None)
            elif event["type"] == "session.status_idle":
                return {"answered": str(answered)}
            for use in list(uses.values()) if stream.caught_up else ():
                await session.events.send(tool_result_event(use))
                del uses[use["id"]]
                answered += 1
    raise AssertionError("the stream ended before the turn did")


def lose_lease(plane: ControlPlane, session: Session) -> None:
    """Let the lease expire; the pool notices the loss by a redelivery of the item."""
    expire_lease(plane, session.item.id)
    plane.operations.wake_all_polls()


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(item_requests, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(item_requests, "RETRY_CAP_SECONDS", 0.1)


@pytest.fixture
def run_scripted_session(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any
) -> Callable[..., Awaitable[Any]]:
    """Return a function that runs a pool until its only session, a scripted one, has ended."""

    async def run_pool_until_session_ends(
        call: Any, *script: dict[str, Any], **settings: Any
    ) -> Any:
        (item,) = control_plane.enqueue(script=script)
        plugin = call if find_handler_rule(call) else handler(call)
        async with make_pool(plugin, **settings):
            return await wait_for_session_end(item.id)

    return run_pool_until_session_ends


async def test_handler_answers_every_tool_use_of_scripted_session(
    control_plane: ControlPlane, run_scripted_session: Any
) -> None:
    script = [{"name": "Bash", "input": {"command": str(number)}} for number in range(10)]
    final = await run_scripted_session(answer_all_tool_uses, *script)
    assert (final.outcome, final.metadata) == ("completed", {"answered": "10"})
    events = control_plane.events(final.item.session_id)
    texts = [one["content"][0]["text"] for one in events if one["type"] == "user.tool_result"]
    assert texts == [f"ran {number}" for number in range(10)]


async def test_each_tool_use_is_answered_once_although_requests_fail(
    control_plane: ControlPlane, run_scripted_session: Any, faults: Faults
) -> None:
    for fault in (lost(applied=True), lost(applied=False), status(503), reset()):
        faults.add(fault, "send", "stream", "events", probability=0.15)
    final = await run_scripted_session(answer_all_tool_uses, *[BASH] * 15)
    assert final.outcome == "completed"
    events = control_plane.events(final.item.session_id)
    uses = [event["id"] for event in events if event["type"] == "agent.tool_use"]
    assert [one["tool_use_id"] for one in events if one["type"] == "user.tool_result"] == uses
    assert len(uses) == 15
    assert len(faults.of("send")) > 15


async def test_session_events_list_returns_history(run_scripted_session: Any) -> None:
    async def return_event_types(session: Session) -> dict[str, str]:
        return {"types": " ".join([event["type"] async for event in session.events.list()])}

    final = await run_scripted_session(return_event_types, BASH)
    assert final.metadata["types"] == "user.message session.status_running agent.tool_use"


async def test_unanswered_send_of_message_is_not_repeated(
    control_plane: ControlPlane, run_scripted_session: Any, faults: Faults
) -> None:
    # A call that is answered 429 was not applied, so it is repeated.
    faults.add(status(429), "send", times=2)
    faults.add(lost(applied=True), "send", times=1, skip=2)

    async def send_message(session: Session) -> None:
        with pytest.raises(TransientError):
            await session.events.send(MESSAGE)

    final = await run_scripted_session(send_message, BASH)
    assert final.outcome == "completed"
    events = [event["type"] for event in control_plane.events(final.item.session_id)]
    # The scripted session begins with one message, and the handler sent another one.
    assert events.count("user.message") == 2
    assert len(faults.of("send")) == 3


async def test_unanswered_send_returns_event_from_history_after_failed_reads_of_history(
    control_plane: ControlPlane, run_scripted_session: Any, faults: Faults
) -> None:
    faults.add(lost(applied=True), "send", times=1)
    faults.add(status(503), "events", times=2)

    async def send_result(session: Session) -> None:
        (stored,) = await session.events.send(
            tool_result_event(control_plane.events(session.id)[2])
        )
        assert stored == control_plane.events(session.id)[3]

    final = await run_scripted_session(send_result, BASH)
    assert final.outcome == "completed"
    assert [request.op for request in faults.of("send", "events")] == [
        "send",
        # Each repeated send is answered 409, so the pool looks for the result in the history.
        *["send", "events"] * 3,
    ]


async def test_second_and_different_result_for_tool_use_raises_conflict_error(
    control_plane: ControlPlane, run_scripted_session: Any
) -> None:
    async def send_conflicting_result(session: Session) -> None:
        use = control_plane.events(session.id)[-1]
        control_plane.operations.send_events(
            session.id, [{**tool_result_event(use), "content": []}]
        )
        with pytest.raises(ConflictError):
            await session.events.send(tool_result_event(use))

    assert (await run_scripted_session(send_conflicting_result, BASH)).outcome == "completed"


async def test_events_after_lost_lease_are_neither_sent_nor_read(
    control_plane: ControlPlane, run_scripted_session: Any, faults: Faults
) -> None:
    raised: list[type[BaseException]] = []

    async def use_events_without_lease(session: Session) -> None:
        events = session.events
        use = control_plane.events(session.id)[-1]
        async with events.stream() as stream:
            for _ in range(3):
                await anext(stream)
            lose_lease(control_plane, session)
            with pytest.raises(asyncio.CancelledError):
                await anext(stream)
            before = len(faults.seen)
            for call in (lambda: anext(stream), lambda: events.send(tool_result_event(use)),
                         lambda: anext(events.list())):  # fmt: skip
                with pytest.raises(LeaseLost) as caught:
                    await call()
                raised.append(caught.type)
            assert [one.op for one in faults.seen[before:] if one.op in {"send", "events"}] == []

    final = await run_scripted_session(use_events_without_lease, BASH)
    assert final.outcome == "lease_lost"
    assert len(raised) == 3


async def test_event_stream_in_task_of_handler_ends_when_lease_is_lost(
    control_plane: ControlPlane, run_scripted_session: Any
) -> None:
    """The pool does not cancel tasks that a handler started, so the stream must end by itself."""
    ended = asyncio.Event()

    async def read_stream(stream: EventStream, caught_up: asyncio.Event) -> None:
        async for _ in stream:
            if stream.caught_up:
                caught_up.set()

    async def follow_stream(session: Session, caught_up: asyncio.Event) -> None:
        async with session.events.stream() as stream:
            with pytest.raises(LeaseLost):
                await read_stream(stream, caught_up)
        ended.set()

    async with asyncio.TaskGroup() as group:

        async def follow_stream_in_task(session: Session) -> None:
            caught_up = asyncio.Event()
            group.create_task(follow_stream(session, caught_up))
            await caught_up.wait()
            lose_lease(control_plane, session)
            async with asyncio.timeout(30):
                await ended.wait()

        assert (await run_scripted_session(follow_stream_in_task, BASH)).outcome == "lease_lost"


async def test_event_send_in_progress_is_cancelled_when_lease_is_lost(
    control_plane: ControlPlane, run_scripted_session: Any, faults: Faults
) -> None:
    hold = Hold()
    faults.add(hold, "send")
    raised: list[type[BaseException]] = []

    async def send_event(session: Session) -> None:
        with pytest.raises(LeaseLost) as caught:
            await session.events.send(tool_result_event(control_plane.events(session.id)[-1]))
        raised.append(caught.type)

    async with asyncio.TaskGroup() as group:

        async def send_event_in_task(session: Session) -> None:
            group.create_task(send_event(session))
            await hold.reached()
            lose_lease(control_plane, session)
            await asyncio.Event().wait()

        assert (await run_scripted_session(send_event_in_task, BASH)).outcome == "lease_lost"
    assert raised == [LeaseLost]
    hold.release()


async def test_events_after_end_of_session_are_neither_sent_nor_read(
    run_scripted_session: Any, faults: Faults
) -> None:
    kept: list[Session] = []

    async def store_session(session: Session) -> None:
        kept.append(session)

    assert (await run_scripted_session(store_session, BASH)).outcome == "completed"
    (session,) = kept
    with pytest.raises(SessionEnded):
        await session.events.send(MESSAGE)
    with pytest.raises(SessionEnded):
        await anext(session.events.list())
    async with session.events.stream() as stream:
        with pytest.raises(SessionEnded):
            await anext(stream)
    assert not faults.of("send", "events", "stream")


class SecretAddingMiddleware:
    """A middleware that adds a secret to every polled item and records the tokens of requests."""

    def __init__(self, secret: object) -> None:
        self.secret = secret
        self.used_tokens: dict[str, set[str]] = {}

    @web.middleware
    async def add_secret_to_polled_item(
        self, request: web.Request, handler: Any
    ) -> web.StreamResponse:
        tail = request.path.rpartition("/")[2]
        self.used_tokens.setdefault(tail, set()).add(request.headers["Authorization"])
        response = await handler(request)
        if tail == "poll" and (item := json.loads(response.body)) is not None:
            return web.json_response({**item, "secret": self.secret})
        assert isinstance(response, web.StreamResponse)
        return response


def encode_secret(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("secret", "uses_own_token"),
    [
        (encode_secret({"sessions_token": SESSIONS_TOKEN, "other": {"more": "?>~"}}), True),
        (encode_secret({"sessions_token": "not a token\r\n"}), False),
        (encode_secret({"sessions_token": 1}), False),
        (encode_secret({}), False),
        (encode_secret([SESSIONS_TOKEN]), False),
        ("%%%", False),
        ("é", False),
        (None, False),
        ({"sessions_token": SESSIONS_TOKEN}, False),
    ],
)
async def test_item_token_is_used_only_for_event_calls_and_never_logged(
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    secret: object,
    *,
    uses_own_token: bool,
) -> None:
    caplog.set_level("DEBUG")
    shown: list[str] = []

    async def record_reprs_and_answer_tool_uses(session: Session) -> None:
        shown.append(f"{session!r} {session.item!r} {session.item}")
        await answer_all_tool_uses(session)

    secrets, faults = SecretAddingMiddleware(secret), Faults()
    faults.add(status(500), "send", "stream", times=2)
    tokens = {"environment-key": None, SESSIONS_TOKEN: frozenset({DEFAULT_ENVIRONMENT})}
    async with ControlPlane(
        tokens=tokens, middlewares=[secrets.add_secret_to_polled_item, faults.middleware]
    ) as plane:
        (item,) = plane.enqueue(script=[BASH])
        settings = {"base_url": plane.anthropic_base_url, "token": "environment-key"}
        async with make_pool(
            handler(record_reprs_and_answer_tool_uses), dialect="anthropic", **settings
        ):
            await recorder.wait_for(SessionFinished)
        assert plane.events(item.session_id)[-1]["stop_reason"] == {"type": "end_turn"}
    own = {f"Bearer {SESSIONS_TOKEN if uses_own_token else 'environment-key'}"}
    assert secrets.used_tokens["events"] == secrets.used_tokens["stream"] == own
    assert (
        secrets.used_tokens["ack"] == secrets.used_tokens["heartbeat"] == {"Bearer environment-key"}
    )
    shown_text = "\n".join([caplog.text, *shown, *map(repr, recorder.events)])
    assert "sessions_token=" in shown_text
    assert SESSIONS_TOKEN not in shown_text
    assert not isinstance(secret, str) or len(secret) < 4 or secret not in shown_text
