"""The log of a pool has one line for each session and reclaim, and ids on every record."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.redelivered_items import enqueue_redelivered_item
from workpool import Release, Session, handler
from workpool.events import HeartbeatFinished, ItemReclaimed, SessionFinished
from workpool.log_fields import FIELDS
from workpool.testing import literal

if TYPE_CHECKING:
    from aiohttp import web

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@handler
async def end_session_as_metadata_says(session: Session) -> None:
    session.log.info("at work", extra={"reason": "a report"})
    if session.item.metadata.get("do") == "fail":
        raise RuntimeError("as it was asked to")
    if session.item.metadata.get("do") == "release" and session.attempt == 1:
        raise Release("busy\nhere")


def read_log_fields_of_message(
    caplog: pytest.LogCaptureFixture, message: str
) -> list[dict[str, Any]]:
    """Return the fields of each log record whose message is `message`."""
    names = {*FIELDS, "levelname"}
    return [
        {name: value for name, value in vars(record).items() if name in names}
        for record in caplog.records
        if record.getMessage() == message
    ]


async def test_each_session_ends_with_one_log_line_at_level_info(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "workpool")
    control_plane.enqueue()
    control_plane.enqueue(metadata={"do": "fail"})
    control_plane.enqueue(metadata={"do": "release"})
    async with make_pool(end_session_as_metadata_says) as pool:
        await recorder.wait_for(SessionFinished, count=3)
        ids = pool.log_ids
    lines = read_log_fields_of_message(caplog, "session ended")
    assert sorted(line["outcome"] for line in lines) == ["completed", "failed", "released"]
    ended = {event.session.item.id: event for event in recorder.of(SessionFinished)}
    for line in lines:
        event = ended[line["work_id"]]
        reason = {"reason": "busy\\nhere"} if event.outcome == "released" else {}
        assert line == {
            "levelname": "INFO",
            "work_id": event.session.item.id,
            "session_id": event.session.id,
            "handler": event.handler,
            "outcome": event.outcome,
            "seconds": round(event.seconds, 3),
            "attempt": event.session.attempt,
            **reason,
            **ids,
        }


async def test_handler_failure_is_logged_with_item_and_session_ids(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (item,) = control_plane.enqueue(metadata={"do": "fail"})
    async with make_pool(end_session_as_metadata_says) as pool:
        await recorder.wait_for(SessionFinished)
        ids = pool.log_ids
    (line,) = read_log_fields_of_message(caplog, "handler failed")
    assert line == {
        "levelname": "ERROR",
        "work_id": item.id,
        "session_id": item.session_id,
        "handler": "end_session_as_metadata_says.end_session_as_metadata_says",
        **ids,
    }


async def test_every_log_record_of_pool_has_pool_ids(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The lease renewer's thread and the tasks of the embedder log the ids of the pool, too."""
    caplog.set_level(logging.DEBUG, "workpool")
    control_plane.enqueue(2)
    async with make_pool(end_session_as_metadata_says) as pool:
        await recorder.wait_for(SessionFinished, count=2)
        pool.pause("for lunch")
        pool.resume()
        ids = pool.log_ids
    assert set(ids) == {"environment_id", "worker_id"}
    ours = [
        each
        for each in caplog.records
        if each.name.startswith("workpool") and not each.name.startswith("workpool.server")
    ]
    assert {each.getMessage() for each in ours} >= {
        "pool started",
        "poll ended",
        "item received",
        "ack ended",
        "heartbeat ended",
        "at work",
        "session ended",
        "stop ended",
        "paused",
        "resumed",
        "draining",
        "drained",
    }
    without = [each.getMessage() for each in ours if not ids.items() <= vars(each).items()]
    assert not without


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_heartbeat_of_renewer_thread_is_logged_with_pool_ids(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @handler
    async def wait_for_interruption(session: Session) -> None:
        await session.interrupted()

    caplog.set_level(logging.DEBUG, "workpool")
    control_plane.enqueue()
    async with make_pool(wait_for_interruption) as pool:
        await recorder.wait_for(HeartbeatFinished, count=3)
        ids = pool.log_ids
    lines = [each for each in caplog.records if each.message == "heartbeat ended"]
    assert "workpool-lease-renewer" in {each.threadName for each in lines}
    assert all(ids.items() <= vars(each).items() for each in lines)


async def test_log_records_of_session_contain_trace_id_of_item(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def add_traceparent_to_response(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        response.headers["traceparent"] = TRACE
        return response

    caplog.set_level(logging.INFO, "workpool")
    faults.add(add_traceparent_to_response, "poll")
    control_plane.enqueue()
    async with make_pool(end_session_as_metadata_says):
        await recorder.wait_for(SessionFinished)
    for message in ("at work", "session ended"):
        [line] = read_log_fields_of_message(caplog, message)
        assert line["trace_id"] == TRACE.split("-")[1]
    assert read_log_fields_of_message(caplog, "at work")[0]["reason"] == "a report"


async def test_log_line_of_session_contains_trace_id_that_handler_sets(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @handler
    async def set_traceparent_from_metadata(session: Session) -> None:
        session.traceparent = session.item.metadata["trace"]

    caplog.set_level(logging.INFO, "workpool")
    control_plane.enqueue(metadata={"trace": TRACE})
    control_plane.enqueue(metadata={"trace": "malformed"})
    async with make_pool(set_traceparent_from_metadata):
        await recorder.wait_for(SessionFinished, count=2)
    lines = read_log_fields_of_message(caplog, "session ended")
    assert sorted(line.get("trace_id", "") for line in lines) == ["", TRACE.split("-")[1]]


async def test_pool_at_level_info_logs_no_polls(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "workpool")
    control_plane.enqueue()
    async with make_pool(end_session_as_metadata_says):
        await recorder.wait_for(SessionFinished)
    assert not [each for each in caplog.records if each.levelno < logging.INFO]
    assert len(read_log_fields_of_message(caplog, "session ended")) == 1


async def test_item_that_another_worker_lost_is_logged_as_reclaimed(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "workpool")
    work_id = enqueue_redelivered_item(control_plane)
    async with make_pool(end_session_as_metadata_says):
        await recorder.wait_for(SessionFinished)
    [line] = read_log_fields_of_message(caplog, "item reclaimed")
    assert (line["work_id"], line["direction"], line["stage"]) == (work_id, "gained", "poll")


async def test_item_with_ack_conflict_is_logged_as_lost(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "workpool")
    faults.add(literal(b'{"error": {"type": "conflict"}}', 409), "ack", times=1)
    (item,) = control_plane.enqueue()
    async with make_pool(end_session_as_metadata_says, block_ms=20):
        await recorder.wait_for(ItemReclaimed)
    [line] = read_log_fields_of_message(caplog, "item reclaimed")
    assert (line["work_id"], line["direction"], line["stage"]) == (item.id, "lost", "ack")
