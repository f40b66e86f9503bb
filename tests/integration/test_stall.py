"""Sessions without progress. See workpool/docs/handlers.md, "Progress"."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from workpool import Session, handler
from workpool.events import SessionFinished, SessionStarted
from workpool.testing import Recorder, in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from workpool.server import ControlPlane
    from workpool.testing import Kit, Recorder

STALL = 30.0
"""The `stall_timeout` of these tests, in virtual seconds."""


MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "go on"}]}


async def hang() -> None:
    await asyncio.Event().wait()


async def stall_outcome(
    workpool: Kit, act: Callable[[Session], Awaitable[object]], **settings: Any
) -> tuple[str, float]:
    """Run a session with that handler; return its outcome and its seconds."""

    @handler
    async def work(session: Session) -> None:
        await act(session)

    result = await workpool.run_session(work, **{"stall_timeout": STALL, **settings})
    return result.outcome, round(result.seconds)


@in_virtual_time
async def test_session_without_progress_is_stalled_and_its_item_stopped(workpool: Kit) -> None:
    @handler
    async def work(session: Session) -> None:
        await asyncio.sleep(20)
        session.progress()
        await hang()

    result = await workpool.run_session(work, stall_timeout=STALL)
    assert (result.outcome, result.item.state) == ("stalled", "stopped")
    assert dict(result.metadata) == {"workpool.error": "SessionStalled"}
    assert round(result.seconds) == 50


@in_virtual_time
async def test_session_without_stall_timeout_may_report_no_progress(workpool: Kit) -> None:
    async def work(_: Session) -> None:
        await asyncio.sleep(10_000)

    assert await stall_outcome(workpool, work, stall_timeout=None) == ("completed", 10_000)


@in_virtual_time
async def test_session_that_makes_progress_is_not_stalled(workpool: Kit) -> None:
    async def work(session: Session) -> None:
        for _ in range(10):
            await asyncio.sleep(STALL - 1)
            session.progress()

    assert await stall_outcome(workpool, work) == ("completed", 290)


@in_virtual_time
async def test_metadata_and_events_are_progress(workpool: Kit) -> None:
    async def work(session: Session) -> None:
        for number in range(5):
            await asyncio.sleep(STALL - 1)
            await session.update_metadata({"page": str(number)})
            await asyncio.sleep(STALL - 1)
            await session.events.send(MESSAGE)

    assert await stall_outcome(workpool, work) == ("completed", 290)


@in_virtual_time
async def test_session_that_waits_for_a_person_is_not_stalled(workpool: Kit) -> None:
    async def work(session: Session) -> None:
        with session.waiting():
            await asyncio.sleep(1_000)
            with session.waiting():
                await asyncio.sleep(1_000)
            await asyncio.sleep(1_000)
        await hang()

    outcome, seconds = await stall_outcome(workpool, work)
    assert outcome == "stalled"
    assert 3_000 + STALL <= seconds <= 3_000 + 2 * STALL


@in_virtual_time
async def test_stall_timeout_of_handler_replaces_the_setting(workpool: Kit) -> None:
    @handler(stall_timeout=5)
    async def work(_: Session) -> None:
        await hang()

    result = await workpool.run_session(work, stall_timeout=STALL)
    assert (result.outcome, round(result.seconds)) == ("stalled", 5)


@in_virtual_time
async def test_stalled_handler_can_clean_up_but_its_progress_changes_nothing(workpool: Kit) -> None:
    async def work(session: Session) -> None:
        try:
            await hang()
        finally:
            for _ in range(5):
                await asyncio.sleep(1)
                session.progress()

    assert await stall_outcome(workpool, work) == ("stalled", 35)


@in_virtual_time
async def test_error_of_a_stalled_handler_is_written(workpool: Kit) -> None:
    @handler
    async def work(_: Session) -> None:
        try:
            await hang()
        finally:
            raise OSError("connection lost")

    result = await workpool.run_session(work, stall_timeout=STALL, report_errors="message")
    assert result.outcome == "stalled"
    assert dict(result.metadata) == {"workpool.error": "OSError: connection lost"}


@in_virtual_time
async def test_stall_is_logged_with_handler_and_seconds(
    workpool: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(_: Session) -> None:
        await hang()

    await stall_outcome(workpool, work)
    assert "session stalled" in caplog.text


@in_virtual_time
async def test_session_that_stalls_in_a_drain_is_stalled(workpool: Kit) -> None:
    (item,) = workpool.enqueue()

    @handler
    async def work(_: Session) -> None:
        await hang()

    async with workpool.pool(work, stall_timeout=STALL) as supervisor:
        await workpool.wait_for(SessionStarted)
        await supervisor.drain(timeout=None)
    finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "stalled"
    assert workpool.item(item).state == "stopped"


async def test_progress_from_a_thread_counts(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    def report_from_thread(session: Session) -> None:
        for _ in range(10):
            time.sleep(0.1)
            session.progress()

    @handler
    async def work(session: Session) -> None:
        await asyncio.to_thread(report_from_thread, session)

    control_plane.enqueue()
    async with make_pool(work, stall_timeout=0.5):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


async def test_loop_that_was_blocked_stalls_no_other_session(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    @handler(metadata={"job": "steady"})
    async def steady_handler(session: Session) -> None:
        for _ in range(10):
            await asyncio.sleep(0.1)
            session.progress()

    @handler(metadata={"job": "block"})
    async def blocking_handler(_: Session) -> None:
        await asyncio.sleep(0.15)
        time.sleep(1.5)  # noqa: ASYNC251 - it blocks the loop on purpose

    control_plane.enqueue(metadata={"job": "steady"})
    control_plane.enqueue(metadata={"job": "block"})
    async with make_pool(steady_handler, blocking_handler, stall_timeout=1.0, concurrency=2):
        await recorder.wait_for(SessionFinished, count=2)
    assert {event.handler: event.outcome for event in recorder.of(SessionFinished)} == {
        "steady_handler.steady_handler": "completed",
        "blocking_handler.blocking_handler": "completed",
    }


async def test_longest_time_without_progress_of_a_handler_is_a_gauge(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    go_on, may_end = asyncio.Event(), asyncio.Event()

    @handler
    async def work(session: Session) -> None:
        with session.waiting():
            await go_on.wait()
        await may_end.wait()

    def gauge_value() -> float:
        ((_, _, _, longest),) = supervisor._snapshot().sessions
        assert isinstance(longest, float)
        return longest

    control_plane.enqueue()
    async with make_pool(work) as supervisor:
        await recorder.wait_for(SessionStarted)
        await asyncio.sleep(0.1)
        assert gauge_value() == 0
        go_on.set()
        async with asyncio.timeout(10):
            while gauge_value() < 0.1:  # noqa: ASYNC110 - nothing tells of the time that passes
                await asyncio.sleep(0.02)
        may_end.set()
