"""The fixture `workpool` from the point of view of authors of handlers."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import TYPE_CHECKING

import pytest

from workpool import Release, Session, handler
from workpool.errors import RefusedError
from workpool.events import SessionFinished, SessionStarted
from workpool.testing import Hold, Kit, delay, expired, in_virtual_time, lost, status

if TYPE_CHECKING:
    from workpool.testing import SessionResult

HOUR_SECONDS = 3600.0


@handler(metadata={"job": "add"})
async def add_numbers(session: Session) -> dict[str, str]:
    metadata = session.item.metadata
    return {"sum": str(int(metadata["a"]) + int(metadata["b"]))}


@handler
async def wait_for_cancellation(session: Session) -> dict[str, str]:
    await session.interrupted()
    return {"heard": "stopping" if session.stopping else "draining"}


@handler
async def sleep_for_given_seconds(session: Session) -> dict[str, str]:
    await asyncio.sleep(float(session.item.metadata["seconds"]))
    return {"slept": session.item.metadata["seconds"]}


@handler
async def release_first_session(session: Session) -> None:
    if not session.redelivered:
        raise Release("not yet", delay=60)


@handler
async def answer_tool_uses(session: Session) -> None:
    async with session.events.stream() as stream:
        async for event in stream:
            if event["type"] == "agent.tool_use":
                await asyncio.sleep(float(event["input"]["seconds"]))
                result = {"tool_use_id": event["id"], "content": [], "is_error": False}
                await session.events.send({"type": "user.tool_result", **result})
            if event.get("stop_reason", {}).get("type") == "end_turn":
                return


async def test_result_of_completed_session_contains_outcome_and_metadata(workpool: Kit) -> None:
    result = await workpool.run_session(add_numbers, metadata={"job": "add", "a": "1", "b": "2"})
    assert (result.outcome, result.item.state) == ("completed", "stopped")
    assert result.metadata == {"job": "add", "a": "1", "b": "2", "sum": "3"}
    assert result.error is None
    assert result.seconds > 0


async def test_result_of_failed_session_contains_exception_of_handler(workpool: Kit) -> None:
    result = await workpool.run_session(add_numbers, metadata={"job": "add", "a": "one", "b": "2"})
    assert (result.outcome, result.metadata["workpool.error"]) == ("failed", "ValueError")
    assert isinstance(result.error, ValueError)


async def test_sessions_of_one_test_share_control_plane(workpool: Kit) -> None:
    for a in ("1", "2"):
        await workpool.run_session(add_numbers, metadata={"job": "add", "a": a, "b": "2"})
    assert workpool.server.summary().stopped == 2
    assert [each.outcome for each in workpool.recorder.of(SessionFinished)] == ["completed"] * 2


async def test_stop_by_operator_interrupts_handler_before_next_heartbeat_is_due(
    workpool: Kit,
) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation, lease_ttl=600):
        await workpool.wait_for(SessionStarted)
        workpool.stop(item)
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "stopped"
    done = workpool.item(item)
    assert done.metadata["heard"] == "stopping"


async def test_drain_interrupts_handler(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation) as pool:
        await workpool.wait_for(SessionStarted)
        await pool.drain()
    done = workpool.item(item)
    assert (done.state, done.metadata["heard"]) == ("stopped", "draining")


async def test_faults_are_injected_into_requests_of_pool(workpool: Kit) -> None:
    workpool.faults.add(status(503, retry_after=0), "poll", times=2)
    lost_once = workpool.faults.add(lost(), "stop", times=1)
    result = await workpool.run_session(add_numbers, metadata={"job": "add", "a": "1", "b": "2"})
    assert (result.outcome, lost_once.hits) == ("completed", 1)
    assert len(workpool.faults.of("poll")) >= 3


async def test_fixture_method_run_session_fails_at_once_without_matching_handler(
    workpool: Kit,
) -> None:
    with pytest.raises(AssertionError) as caught:
        await workpool.run_session(add_numbers, metadata={"job": "subtract"}, timeout=3600)
    assert str(caught.value).splitlines() == [
        "the item was declined as unwanted; it has: job=subtract",
        "add_numbers takes type=session job=add",
    ]


@in_virtual_time
async def test_report_of_unfinished_session_shows_line_where_handler_waits(workpool: Kit) -> None:
    with pytest.raises(AssertionError) as caught:
        await workpool.run_session(
            sleep_for_given_seconds,
            metadata={"seconds": str(2 * HOUR_SECONDS)},
            timeout=HOUR_SECONDS,
        )
    error_text = str(caught.value)
    assert "the session has not ended within 3600 s" in error_text
    assert "the item is active; it was created, delivered, acked, heartbeat ×" in error_text
    assert "sleep_for_given_seconds waits here:" in error_text
    assert 'await asyncio.sleep(float(session.item.metadata["seconds"]))' in error_text
    assert re.search(
        r"the pool reported: .*\bItemReceived, AckFinished, HeartbeatFinished ×", error_text
    )


async def test_fixture_reports_other_events_if_awaited_event_does_not_occur(workpool: Kit) -> None:
    workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        await workpool.wait_for(SessionStarted)
        with pytest.raises(
            AssertionError, match=r"another SessionFinished; the pool reported: .*Started"
        ):
            await workpool.wait_for(SessionFinished, timeout=0.05)


async def test_fixture_method_run_session_raises_error_of_failed_pool(workpool: Kit) -> None:
    workpool.faults.add(status(401), "poll")
    with pytest.raises(RefusedError, match="401"):
        await workpool.run_session(wait_for_cancellation)


async def test_class_kit_raises_if_session_is_run_outside_async_with_block() -> None:
    async with Kit() as kit:
        result = await kit.run_session(add_numbers, metadata={"job": "add", "a": "1", "b": "2"})
    assert result.metadata["sum"] == "3"
    with pytest.raises(RuntimeError, match=r"async with Kit\(\)"):
        await Kit().run_session(add_numbers)


def test_use_of_workpool_fixture_in_test_without_async_def_raises(workpool: Kit) -> None:
    with pytest.raises(RuntimeError, match="async def"):
        workpool.enqueue()


@in_virtual_time
async def test_session_duration_in_virtual_time_is_exact(workpool: Kit) -> None:
    result = await workpool.run_session(
        sleep_for_given_seconds, metadata={"seconds": str(6 * HOUR_SECONDS)}
    )
    assert result.outcome == "completed"
    assert result.seconds == pytest.approx(6 * HOUR_SECONDS, abs=1)


@in_virtual_time
async def test_session_timeout_in_virtual_time_is_exact(workpool: Kit) -> None:
    seconds = {"seconds": str(2 * HOUR_SECONDS)}
    result = await workpool.run_session(
        sleep_for_given_seconds, metadata=seconds, session_timeout=HOUR_SECONDS
    )
    assert result.outcome == "timed_out"
    assert result.seconds == pytest.approx(HOUR_SECONDS, abs=1)


@in_virtual_time
async def test_released_item_is_delivered_again(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(release_first_session):
        first = await workpool.wait_for(SessionFinished)
        second = await workpool.wait_for(SessionFinished, count=2)
    assert (first.outcome, second.outcome) == ("released", "completed")
    done = workpool.item(item)
    # The released run was not counted as an attempt, so the second run is attempt 1, too.
    assert second.session.attempt == 1
    assert "workpool.released" not in done.metadata


@in_virtual_time
async def test_session_in_virtual_time_ends_if_its_item_is_stopped(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        await asyncio.sleep(HOUR_SECONDS)
        workpool.stop(item)
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "stopped"
    assert finished.seconds == pytest.approx(HOUR_SECONDS, abs=1)


def tool_use_ids(result: SessionResult) -> tuple[list[str], list[str]]:
    asked = [each["id"] for each in result.events if each["type"] == "agent.tool_use"]
    answered = [each["tool_use_id"] for each in result.events if each["type"] == "user.tool_result"]
    return asked, answered


async def test_scripted_session_emits_next_tool_use_after_each_result(workpool: Kit) -> None:
    script = [{"name": "Bash", "input": {"seconds": 0}}] * 3
    result = await workpool.run_session(answer_tool_uses, script=script)
    asked, answered = tool_use_ids(result)
    assert (result.outcome, len(asked)) == ("completed", 3)
    assert asked == answered
    assert result.events[-1]["stop_reason"]["type"] == "end_turn"


@in_virtual_time
async def test_scripted_session_in_virtual_time_lasts_as_long_as_its_tool_uses(
    workpool: Kit,
) -> None:
    script = [{"name": "Bash", "input": {"seconds": HOUR_SECONDS}}] * 3
    result = await workpool.run_session(answer_tool_uses, script=script)
    asked, answered = tool_use_ids(result)
    assert (result.outcome, len(asked)) == ("completed", 3)
    assert asked == answered
    assert result.seconds == pytest.approx(3 * HOUR_SECONDS, abs=10)


@in_virtual_time
async def test_faults_are_injected_and_requests_are_recorded_in_virtual_time(workpool: Kit) -> None:
    workpool.faults.add(status(503, retry_after=30), "poll", times=2)
    lost_once = workpool.faults.add(lost(), "stop", times=1)
    result = await workpool.run_session(add_numbers, metadata={"job": "add", "a": "1", "b": "2"})
    assert (result.outcome, lost_once.hits) == ("completed", 1)
    polls, stops = workpool.faults.of("poll"), workpool.faults.of("stop", work_id=result.item.id)
    assert [poll.status for poll in polls[:3]] == [503, 503, 200]
    assert polls[2].at - polls[0].at >= 60
    assert [(stop.status, stop.lost) for stop in stops] == [(None, True), (200, False)]


@in_virtual_time
async def test_session_in_virtual_time_has_outcome_lease_lost_after_fault_ends_lease(
    workpool: Kit,
) -> None:
    workpool.faults.add(expired(workpool.server), "heartbeat", skip=1, times=1)
    result = await workpool.run_session(sleep_for_given_seconds, metadata={"seconds": "100"})
    assert result.outcome == "lease_lost"


@in_virtual_time
async def test_fixture_waits_in_virtual_time_until_delayed_request_is_answered(
    workpool: Kit,
) -> None:
    workpool.faults.add(delay(8, applied=True), "ack")
    [item] = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        ack = await workpool.faults.wait_for("ack", work_id=item.id, answered=True)
        assert (ack.status, ack.worker_id is not None) == (200, True)
        assert asyncio.get_running_loop().time() - ack.at == pytest.approx(8)


@in_virtual_time
async def test_fault_that_needs_http_is_refused_in_virtual_time(workpool: Kit) -> None:
    with pytest.raises(TypeError, match="virtual time has none"):
        workpool.faults.add(Hold(), "poll")


async def test_fixture_returns_another_event_at_each_wait_unless_count_is_given(
    workpool: Kit,
) -> None:
    workpool.enqueue(count=2)
    async with workpool.pool(wait_for_cancellation):
        first = await workpool.wait_for(SessionStarted)
        second = await workpool.wait_for(SessionStarted)
        assert first.session.item.id != second.session.item.id
        with pytest.raises(AssertionError, match=r"another SessionStarted"):
            await workpool.wait_for(SessionStarted, timeout=0.05)
        assert await workpool.wait_for(SessionStarted, count=1) is first


async def test_fixture_lists_items_and_waiting_handlers_if_awaited_event_does_not_occur(
    workpool: Kit,
) -> None:
    (running,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        await workpool.wait_for(SessionStarted)
        with pytest.raises(AssertionError) as caught:
            await workpool.wait_for(SessionFinished, timeout=0.05)
    text = str(caught.value)
    assert f"{running.id}:\nthe item is active" in text
    assert "wait_for_cancellation waits here:" in text
    assert "await session.interrupted()" in text


async def test_lost_lease_ends_session_and_delivers_item_again(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        await workpool.wait_for(SessionStarted)
        workpool.lose(item)
        finished = await workpool.wait_for(SessionFinished)
        again = await workpool.wait_for(SessionStarted)
    assert finished.outcome == "lease_lost"
    assert (again.session.redelivered, again.session.attempt) == (True, 2)


@in_virtual_time
async def test_lost_lease_in_virtual_time_ends_session(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    async with workpool.pool(wait_for_cancellation):
        await workpool.wait_for(SessionStarted)
        workpool.lose(item)
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "lease_lost"


async def test_fixture_method_lose_raises_for_item_without_lease(workpool: Kit) -> None:
    (item,) = workpool.enqueue()
    with pytest.raises(ValueError, match=f"no worker holds a lease of {item.id}: it is queued"):
        workpool.lose(item)


async def test_fixtures_kit_and_workpool_return_same_object(kit: Kit, workpool: Kit) -> None:
    assert kit is workpool


async def test_fixture_named_kit_opens_control_plane_without_fixture_named_workpool(
    kit: Kit,
) -> None:
    assert kit.server.port


def test_handler_that_waits_for_thread_in_virtual_time_causes_error_with_function_name() -> None:
    @handler
    async def wait_in_thread(_: Session) -> None:
        await asyncio.to_thread(release.wait, 20)

    @in_virtual_time
    async def run_in_virtual_time() -> None:
        async with Kit() as kit:
            await kit.run_session(wait_in_thread)

    release = threading.Event()
    with pytest.raises(RuntimeError, match=r"cannot wait for the thread of Event\.wait"):
        run_in_virtual_time()
    release.set()


@in_virtual_time
async def test_class_kit_runs_session_in_virtual_time_without_pytest_fixture() -> None:
    async with Kit() as kit:
        result = await kit.run_session(
            sleep_for_given_seconds, metadata={"seconds": str(HOUR_SECONDS)}
        )
    assert result.seconds == pytest.approx(HOUR_SECONDS, abs=1)
