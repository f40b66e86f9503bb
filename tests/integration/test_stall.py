"""Sessions that are ended because they make no progress.

See workpool/docs/handlers.md, "Progress".
"""

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

STALL_SECONDS = 30.0
"""The `stall_timeout` of these tests, in virtual seconds."""


MESSAGE = {"type": "user.message", "content": [{"type": "text", "text": "go on"}]}


async def wait_forever() -> None:
    await asyncio.Event().wait()


async def run_stalling_session(
    workpool: Kit, behaviour: Callable[[Session], Awaitable[object]], **settings: Any
) -> tuple[str, float]:
    """Run a session whose handler awaits `behaviour`.

    Returns:
        The outcome of the session, and the duration of the session in seconds.
    """

    @handler
    async def run_handler_behaviour(session: Session) -> None:
        await behaviour(session)

    result = await workpool.run_session(
        run_handler_behaviour, **{"stall_timeout": STALL_SECONDS, **settings}
    )
    return result.outcome, round(result.seconds)


@in_virtual_time
async def test_session_without_progress_is_stalled_and_its_item_stopped(workpool: Kit) -> None:
    @handler
    async def report_progress_once(session: Session) -> None:
        await asyncio.sleep(20)
        session.progress()
        await wait_forever()

    result = await workpool.run_session(report_progress_once, stall_timeout=STALL_SECONDS)
    assert (result.outcome, result.item.state) == ("stalled", "stopped")
    assert dict(result.metadata) == {"workpool.error": "SessionStalled"}
    assert round(result.seconds) == 50


@in_virtual_time
async def test_session_without_stall_timeout_completes_although_it_reports_no_progress(
    workpool: Kit,
) -> None:
    async def sleep_without_progress(_: Session) -> None:
        await asyncio.sleep(10_000)

    assert await run_stalling_session(workpool, sleep_without_progress, stall_timeout=None) == (
        "completed",
        10_000,
    )


@in_virtual_time
async def test_session_that_makes_progress_is_not_stalled(workpool: Kit) -> None:
    async def report_progress(session: Session) -> None:
        for _ in range(10):
            await asyncio.sleep(STALL_SECONDS - 1)
            session.progress()

    assert await run_stalling_session(workpool, report_progress) == ("completed", 290)


@in_virtual_time
async def test_metadata_writes_and_sent_events_count_as_progress(workpool: Kit) -> None:
    async def write_metadata_and_send_events(session: Session) -> None:
        for number in range(5):
            await asyncio.sleep(STALL_SECONDS - 1)
            await session.update_metadata({"page": str(number)})
            await asyncio.sleep(STALL_SECONDS - 1)
            await session.events.send(MESSAGE)

    assert await run_stalling_session(workpool, write_metadata_and_send_events) == (
        "completed",
        290,
    )


@in_virtual_time
async def test_session_that_waits_for_a_person_is_not_stalled(workpool: Kit) -> None:
    async def wait_in_nested_waiting_blocks(session: Session) -> None:
        with session.waiting():
            await asyncio.sleep(1_000)
            with session.waiting():
                await asyncio.sleep(1_000)
            await asyncio.sleep(1_000)
        await wait_forever()

    outcome, seconds = await run_stalling_session(workpool, wait_in_nested_waiting_blocks)
    assert outcome == "stalled"
    assert 3_000 + STALL_SECONDS <= seconds <= 3_000 + 2 * STALL_SECONDS


@in_virtual_time
async def test_stall_timeout_of_handler_replaces_stall_timeout_of_settings(workpool: Kit) -> None:
    @handler(stall_timeout=5)
    async def hang_with_own_stall_timeout(_: Session) -> None:
        await wait_forever()

    result = await workpool.run_session(hang_with_own_stall_timeout, stall_timeout=STALL_SECONDS)
    assert (result.outcome, round(result.seconds)) == ("stalled", 5)


@in_virtual_time
async def test_session_is_stalled_although_handler_reports_progress_during_clean_up(
    workpool: Kit,
) -> None:
    async def report_progress_after_stall(session: Session) -> None:
        try:
            await wait_forever()
        finally:
            for _ in range(5):
                await asyncio.sleep(1)
                session.progress()

    assert await run_stalling_session(workpool, report_progress_after_stall) == ("stalled", 35)


@in_virtual_time
async def test_error_raised_by_stalled_handler_is_written_to_metadata(workpool: Kit) -> None:
    @handler
    async def raise_after_stall(_: Session) -> None:
        try:
            await wait_forever()
        finally:
            raise OSError("connection lost")

    result = await workpool.run_session(
        raise_after_stall, stall_timeout=STALL_SECONDS, report_errors="message"
    )
    assert result.outcome == "stalled"
    assert dict(result.metadata) == {"workpool.error": "OSError: connection lost"}


@in_virtual_time
async def test_stall_is_logged_with_handler_and_seconds(
    workpool: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang_in_handler(_: Session) -> None:
        await wait_forever()

    await run_stalling_session(workpool, hang_in_handler)
    [record] = [vars(each) for each in caplog.records if each.message == "session stalled"]
    assert (record["handler"], round(record["seconds"])) == (
        "run_handler_behaviour.run_handler_behaviour",
        STALL_SECONDS,
    )


@in_virtual_time
async def test_session_that_stalls_during_drain_has_outcome_stalled(workpool: Kit) -> None:
    (item,) = workpool.enqueue()

    @handler
    async def hang_in_handler(_: Session) -> None:
        await wait_forever()

    async with workpool.pool(hang_in_handler, stall_timeout=STALL_SECONDS) as supervisor:
        await workpool.wait_for(SessionStarted)
        await supervisor.drain(timeout=None)
    finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "stalled"
    assert workpool.item(item).state == "stopped"


async def test_progress_reported_from_thread_prevents_stall(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    def report_progress_from_thread(session: Session) -> None:
        for _ in range(10):
            time.sleep(0.4)
            session.progress()

    @handler
    async def report_progress_in_thread(session: Session) -> None:
        await asyncio.to_thread(report_progress_from_thread, session)

    control_plane.enqueue()
    async with make_pool(report_progress_in_thread, stall_timeout=3.0):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


async def test_blocked_loop_does_not_stall_other_sessions(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    steady_handler_runs = asyncio.Event()

    @handler(metadata={"job": "steady"})
    async def handler_with_steady_progress(session: Session) -> None:
        for _ in range(10):
            await asyncio.sleep(0.1)
            session.progress()
            steady_handler_runs.set()

    @handler(metadata={"job": "block"})
    async def blocking_handler(session: Session) -> None:
        with session.waiting():
            await steady_handler_runs.wait()
        time.sleep(1.5)  # noqa: ASYNC251 - it blocks the loop on purpose

    control_plane.enqueue(metadata={"job": "steady"})
    control_plane.enqueue(metadata={"job": "block"})
    async with make_pool(
        handler_with_steady_progress, blocking_handler, stall_timeout=1.0, concurrency=2
    ):
        await recorder.wait_for(SessionFinished, count=2)
    assert {event.handler: event.outcome for event in recorder.of(SessionFinished)} == {
        "handler_with_steady_progress.handler_with_steady_progress": "completed",
        "blocking_handler.blocking_handler": "completed",
    }


async def test_gauge_shows_longest_time_that_handler_made_no_progress(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    waits, go_on, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @handler
    async def hang_after_waiting_block(session: Session) -> None:
        with session.waiting():
            waits.set()
            await go_on.wait()
        await may_end.wait()

    def read_gauge_value() -> float:
        ((_, _, _, longest),) = supervisor._take_pool_snapshot().sessions
        assert isinstance(longest, float)
        return longest

    control_plane.enqueue()
    async with make_pool(hang_after_waiting_block) as supervisor:
        await recorder.wait_for(SessionStarted)
        async with asyncio.timeout(20):
            await waits.wait()
        # If the time in the waiting block counted, the gauge would be 0.1 s after this sleep.
        await asyncio.sleep(0.1)
        assert read_gauge_value() == 0
        go_on.set()
        async with asyncio.timeout(20):
            while read_gauge_value() < 0.1:  # noqa: ASYNC110 - the gauge grows with time
                await asyncio.sleep(0.02)
        may_end.set()
