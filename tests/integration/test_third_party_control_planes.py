"""Pools that receive answers as other implementations of the protocol send them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import orjson
import pytest
from aiohttp import web

from workpool import Session, handler
from workpool.events import (
    AckFinished,
    HeartbeatFinished,
    ItemReclaimed,
    SessionFinished,
    SessionStarted,
)
from workpool.testing.fault import Fault, Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder
    from workpool.testing.http_faults import FaultMiddleware

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def middleware_rewriting_answers(
    change: Callable[[dict[str, Any]], dict[str, Any]], **headers: str
) -> FaultMiddleware:
    """Return a middleware that changes the JSON of a successful answer and adds headers."""

    async def rewrite_answer(request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        assert isinstance(response, web.Response)
        value = orjson.loads(response.text or "null")
        if response.status != 200 or value is None:
            return response
        return web.json_response(change(value), headers=headers)

    return rewrite_answer


ACTIVE = Fault(rewrite=lambda item: {**item, "state": "active"})
LOST = Fault(rewrite=lambda answer: {**answer, "last_heartbeat": None, "lease_extended": False})


@pytest.fixture(params=["qoder", "anthropic"])
def make_settings(
    control_plane: ControlPlane, make_settings: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[..., Any]:
    """Return a function that makes settings for one of the dialects."""
    url = {"qoder": control_plane.base_url, "anthropic": control_plane.anthropic_base_url}[
        request.param
    ]
    return lambda **values: make_settings(dialect=request.param, base_url=url, **values)


@handler
async def return_result(_: Session) -> dict[str, str]:
    return {"done": "yes"}


async def test_item_whose_ack_is_answered_with_state_active_is_run(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    faults.add(ACTIVE, "ack")
    final = await run_one_item(return_result)
    assert final.outcome == "completed"
    assert final.request_names == ["ack", "heartbeat", "update", "stop"]
    assert [event.result for event in recorder.of(AckFinished)] == ["ok"]


async def test_item_with_state_active_after_ack_is_not_run_if_another_worker_holds_it(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    (item,) = control_plane.enqueue()

    async def send_heartbeat_of_another_worker(
        request: web.Request, handler: Any
    ) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        control_plane.operations.heartbeat(
            control_plane.environments[0], item.id, "NO_HEARTBEAT", 60, "another"
        )
        return response

    faults.add(ACTIVE, "ack")
    faults.add(send_heartbeat_of_another_worker, "ack")
    async with make_pool(return_result):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "lease_lost"
    assert not recorder.of(SessionStarted)
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat"]
    (lost,) = recorder.of(ItemReclaimed)
    assert (lost.direction, lost.stage) == ("lost", "start")


async def test_health_check_item_is_stopped_after_heartbeat_if_ack_answer_has_state_active(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    faults.add(ACTIVE, "ack")
    (item,) = control_plane.enqueue(work_type="healthcheck")
    async with make_pool(return_result):
        await faults.wait_for("stop", answered=True)
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat", "stop"]


async def test_heartbeat_answer_that_reports_lease_as_not_extended_loses_lease_at_once(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    faults.add(LOST, "heartbeat")
    final = await run_one_item(return_result)
    assert final.outcome == "lease_lost"
    assert final.request_names == ["ack", "heartbeat"]
    assert [event.result for event in recorder.of(HeartbeatFinished)] == ["conflict"]


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_heartbeat_answer_with_state_stopped_ends_session_at_once(
    run_one_item: Any, faults: Faults
) -> None:
    @handler
    async def endless_handler(_: Session) -> None:
        await asyncio.Event().wait()

    stopped = Fault(rewrite=lambda answer: {**answer, "state": "stopped", "lease_extended": False})
    faults.add(stopped, "heartbeat", skip=1)
    final = await run_one_item(endless_handler)
    assert final.outcome == "stopped"
    assert set(final.request_names) == {"ack", "heartbeat"}


async def test_unknown_fields_and_headers_are_ignored_and_traceparent_is_kept(
    run_one_item: Any, faults: Faults, recorder: Recorder
) -> None:
    more = {"lease": {"id": 7}, "ttl": "x", "secret_of_another_kind": [1]}
    for op in ("ack", "heartbeat", "update", "stop"):
        faults.add(
            middleware_rewriting_answers(lambda value: {**more, **value}, **{"X-Lease": "7"}), op
        )
    faults.add(
        middleware_rewriting_answers(lambda value: {**more, **value}, traceparent=TRACE), "poll"
    )
    final = await run_one_item(return_result)
    assert final.outcome == "completed"
    assert recorder.of(SessionStarted)[0].session.item.traceparent == TRACE


@pytest.mark.parametrize("window", [None, 0, 7000])
async def test_reclaim_window_is_sent_only_if_set(
    run_one_item: Any, faults: Faults, window: int | None
) -> None:
    """One control plane ends all leases older than the window, so the window has no default."""
    await run_one_item(
        return_result, **({} if window is None else {"reclaim_older_than_ms": window})
    )
    sent = {request.query.get("reclaim_older_than_ms") for request in faults.of("poll")}
    assert sent == {None if window is None else str(window)}


async def test_extra_headers_are_sent_with_every_call_and_never_logged(
    run_one_item: Any, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str | None] = []

    async def record_worker_token_header(request: web.Request, handler: Any) -> web.StreamResponse:
        seen.append(request.headers.get("x-worker-token"))
        # The pool logs errors. These errors contain the header's value, which the log must redact.
        if len(seen) < 4:
            text = {"error": {"message": f"no {seen[-1]}"}}
            return web.json_response(text, status=503)
        response: web.StreamResponse = await handler(request)
        return response

    async def call_metadata_and_event_methods(session: Session) -> None:
        await session.update_metadata({"a": "b"})
        text = {"type": "text", "text": "hello"}
        await session.events.send({"type": "user.message", "content": [text]})
        async with session.events.stream() as events:
            await anext(aiter(events))

    faults.add(record_worker_token_header, *get_args(Op))
    with caplog.at_level("DEBUG"):
        final = await run_one_item(
            call_metadata_and_event_methods,
            extra_headers={"x-worker-token": "hunter2"},
            stats_interval=60,
        )
    assert final.outcome == "completed"
    assert set(seen) == {"hunter2"}
    assert "poll failed" in caplog.text
    assert "hunter2" not in caplog.text
