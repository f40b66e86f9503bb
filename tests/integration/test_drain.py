"""Drains that begin while an item is in each of its states.

See workpool/docs/architecture.md, "The drain".
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Supervisor, handler, hookimpl
from workpool.events import (
    DrainFinished,
    DrainStarted,
    ItemReceived,
    ItemReclaimed,
    PollFinished,
    SessionFinished,
    SessionStarted,
)
from workpool.testing import Hold, lost, status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.shared_handlers import UncancellableHandler
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

LONG_SECONDS = 60.0


@handler
async def endless_handler(_: Session) -> None:
    await asyncio.Event().wait()


@handler
async def interruptible_handler(session: Session) -> dict[str, str]:
    await session.interrupted()
    return {"draining": str(session.draining)}


async def wait_for_drain_start(supervisor: Supervisor, recorder: Recorder) -> None:
    await recorder.wait_for(DrainStarted)
    assert supervisor.status().draining
    assert supervisor.status().reasons == ("draining",)


async def test_idle_pool_drains_at_once(faults: Faults, make_pool: Any, recorder: Recorder) -> None:
    async with make_pool(endless_handler, pollers=3) as supervisor:
        await faults.wait_for("poll", count=3)
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=LONG_SECONDS)
    results = [event.result for event in recorder.of(PollFinished)]
    assert results[-1] == "cancelled"
    assert set(results) <= {"null", "cancelled"}
    (finished,) = recorder.of(DrainFinished)
    assert finished.result == "clean"


async def test_drain_leaves_waiting_items_in_queue(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    first, *waiting = control_plane.enqueue(3)
    async with make_pool(interruptible_handler, concurrency=1, prefetch=2) as supervisor:
        await recorder.wait_for(SessionStarted)
        await recorder.wait_for(ItemReceived, count=3)
        assert supervisor.status().waiting == 2
    assert supervisor.status().waiting == 0
    for item in waiting:
        assert not faults.of(work_id=item.id)
        assert (
            control_plane.operations.get_item(control_plane.environments[0], item.id).state
            == "queued"
        )
    assert [event.session.item.id for event in recorder.of(SessionFinished)] == [first.id]


async def test_drain_ends_pollers_that_wait_for_free_slot(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    async with make_pool(interruptible_handler, concurrency=1, pollers=3):
        await recorder.wait_for(SessionStarted)
    assert len(recorder.of(PollFinished)) == 1


async def test_item_delivered_during_drain_is_not_claimed(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    hold = Hold(applied=True)
    faults.add(hold, "poll")
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor:
        await hold.reached()
        await supervisor.drain(timeout=LONG_SECONDS)
    assert not recorder.of(ItemReceived)
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "queued"
    )


async def test_item_is_released_without_session_if_its_ack_succeeds_during_drain(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
) -> None:
    hold = Hold()
    faults.add(hold, "ack")
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(supervisor.drain(timeout=LONG_SECONDS))
        await wait_for_drain_start(supervisor, recorder)
        hold.release()
    final = await wait_for_session_end(item.id)
    assert final.outcome == "released"
    assert final.request_names == ["ack", "update", "heartbeat"]
    assert final.sent[-1].query["desired_ttl_seconds"] == "10"
    assert not recorder.of(SessionStarted)
    assert recorder.of(DrainFinished)[0].result == "clean"


@pytest.mark.parametrize("code", [409, 404, 500])
async def test_ack_sent_before_drain_is_not_repeated_if_it_fails_during_drain(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, code: int
) -> None:
    hold = Hold()
    faults.add(hold, "ack")
    faults.add(status(code), "ack")
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(supervisor.drain(timeout=LONG_SECONDS))
        await wait_for_drain_start(supervisor, recorder)
        hold.release()
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack"]
    assert recorder.of(DrainFinished)[0].result == "clean"
    assert [event.stage for event in recorder.of(ItemReclaimed)] == (["drain"] * (code == 409))


async def test_drain_during_first_heartbeat_sends_last_heartbeat_with_short_ttl(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
) -> None:
    hold = Hold()
    faults.add(hold, "heartbeat", times=1)
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(supervisor.drain(timeout=LONG_SECONDS))
        await wait_for_drain_start(supervisor, recorder)
        hold.release()
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("released", "active")
    assert final.request_names == ["ack", "heartbeat", "update", "heartbeat"]
    assert [each.query["desired_ttl_seconds"] for each in final.sent[1::2]] == ["60", "10"]
    assert not recorder.of(SessionStarted)


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_running_sessions_keep_their_leases_during_drain(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
) -> None:
    may_end = asyncio.Event()

    @handler
    async def slow_handler(session: Session) -> dict[str, str]:
        await session.interrupted()
        await may_end.wait()
        await session.update_metadata({"phase": "last"})
        return {"draining": str(session.draining)}

    (item,) = control_plane.enqueue()
    async with make_pool(slow_handler) as supervisor, asyncio.TaskGroup() as group:
        await recorder.wait_for(SessionStarted)
        group.create_task(supervisor.drain(timeout=None))
        await wait_for_drain_start(supervisor, recorder)
        heartbeats = len(faults.of("heartbeat"))
        await faults.wait_for("heartbeat", count=heartbeats + 3, answered=True)
        may_end.set()
    final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.metadata == {"phase": "last", "draining": "True"}


async def test_drain_timeout_of_settings_is_default_deadline(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    async with make_pool(endless_handler, drain_timeout=0.05) as supervisor:
        await recorder.wait_for(SessionStarted)
        await supervisor.drain()
    assert recorder.of(DrainStarted)[0].timeout == 0.05
    assert recorder.of(DrainFinished)[0].result == "deadline"
    assert recorder.of(SessionFinished)[0].outcome == "released"
    assert supervisor.abandoned == 0


@pytest.mark.parametrize("first", [None, LONG_SECONDS])
async def test_second_drain_shortens_deadline(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, first: float | None
) -> None:
    control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        await recorder.wait_for(SessionStarted)
        waiting = group.create_task(supervisor.drain(timeout=first))
        await wait_for_drain_start(supervisor, recorder)
        assert not waiting.done()
        await supervisor.drain(timeout=0)
    assert recorder.of(SessionFinished)[0].outcome == "released"


async def test_many_sessions_at_drain_deadline_are_released_concurrently(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(8)
    async with make_pool(endless_handler, concurrency=8) as supervisor:
        await recorder.wait_for(SessionStarted, count=8)
        await supervisor.drain(timeout=0)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["released"] * 8
    last = {request.work_id: request.query["desired_ttl_seconds"] for request in
            faults.of("heartbeat")}  # fmt: skip
    assert list(last.values()) == ["10"] * 8


async def test_session_whose_release_is_never_answered_is_abandoned_after_drain_deadline(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.2)
    faults.add(lost(), "heartbeat", skip=1)
    control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor:
        await recorder.wait_for(SessionStarted)
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=0)
    assert supervisor.abandoned == 1
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert len(recorder.of(SessionFinished)) == 1


async def test_hanging_ack_does_not_delay_drain(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.1)
    hold = Hold()
    faults.add(hold, "ack")
    control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor:
        await hold.reached()
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=0)
    assert supervisor.abandoned == 1


async def test_handler_that_ignores_cancellation_is_abandoned_by_drain(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    uncancellable_handler: UncancellableHandler,
) -> None:
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.1)
    control_plane.enqueue()
    async with make_pool(uncancellable_handler) as supervisor:
        await recorder.wait_for(SessionStarted)
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=0)
    assert supervisor.abandoned == 1
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert recorder.of(SessionFinished)[0].outcome == "released"
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert left
    uncancellable_handler.may_end.set()
    await asyncio.wait(left, timeout=20)


async def test_exception_inside_async_with_block_drains_pool_with_timeout_zero(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    with pytest.raises(LookupError):  # noqa: PT012 - the block is what is tested
        async with make_pool(endless_handler, drain_timeout=LONG_SECONDS):
            await recorder.wait_for(SessionStarted)
            raise LookupError
    assert recorder.of(DrainStarted)[0].timeout == 0
    assert recorder.of(SessionFinished)[0].outcome == "released"


@pytest.mark.parametrize("where", ["wait", "sleep", "run", "leaving"])
async def test_cancellation_of_task_that_runs_pool_is_raised_after_drain(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, where: str
) -> None:
    supervisor = make_pool(endless_handler, drain_timeout=LONG_SECONDS)

    async def run_embedded_pool() -> None:
        if where == "run":
            await supervisor.run()
            return
        async with supervisor:
            if where == "wait":
                await supervisor.wait()
            elif where == "sleep":
                await asyncio.sleep(LONG_SECONDS)
            await recorder.wait_for(SessionStarted)

    control_plane.enqueue()
    async with asyncio.TaskGroup() as group:
        embedder = group.create_task(run_embedded_pool())
        await recorder.wait_for(DrainStarted if where == "leaving" else SessionStarted)
        embedder.cancel()
        await asyncio.wait({embedder}, timeout=20)
        assert embedder.cancelled()
    assert recorder.of(SessionFinished)[0].outcome == "released"
    assert recorder.of(DrainFinished)[0].result == "deadline"


async def test_repeated_cancellation_of_task_that_runs_pool_leaves_no_pool_task(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()

    async def run_embedded_pool() -> None:
        async with make_pool(endless_handler, drain_timeout=LONG_SECONDS):
            await asyncio.Event().wait()

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        embedding = group.create_task(run_embedded_pool())
        await recorder.wait_for(SessionStarted)
        while not embedding.done():
            embedding.cancel()
            await asyncio.sleep(0)
        assert embedding.cancelled()
        assert recorder.of(DrainFinished)
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "workpool"]
    assert recorder.of(SessionFinished)[0].outcome == "released"


async def test_cancellation_of_wait_method_does_not_drain_pool(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    async with make_pool(interruptible_handler) as supervisor:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await supervisor.wait()
        assert not supervisor.status().draining
        control_plane.enqueue()
        await recorder.wait_for(SessionStarted)


async def test_wait_method_returns_after_pool_has_drained_and_closed(make_pool: Any) -> None:
    async with make_pool(endless_handler) as supervisor, asyncio.TaskGroup() as group:
        waiting = group.create_task(supervisor.wait())
        await supervisor.drain()
        async with asyncio.timeout(20):
            await waiting
        await supervisor.drain()
    await supervisor.wait()


@pytest.mark.parametrize("chunk", range(6))
async def test_cancellation_of_pool_start_at_any_point_leaves_no_task(
    make_settings: Any, recorder: Recorder, chunk: int
) -> None:
    """The start of the pool is cancelled after 0, 1, 2 … 47 iterations of the event loop."""
    for turns in range(chunk * 8, chunk * 8 + 8):
        supervisor = Supervisor(
            make_settings(metrics_listen="127.0.0.1:0"), plugins=[endless_handler, recorder]
        )
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(supervisor.__aenter__())
            for turn in range(turns):
                # After 15 iterations of the event loop, the pool's start waits for another thread.
                # That thread needs real time.
                await asyncio.sleep(0.0005 * (turn > 15))
            starting.cancel()
            await asyncio.wait({starting}, timeout=20)
        if starting.cancelled():
            assert asyncio.all_tasks() - {asyncio.current_task()} == find_request_handler_tasks()
        else:
            await supervisor.__aexit__(None, None, None)


def find_request_handler_tasks() -> set[Any]:
    """Return the tasks of the control plane that answer requests."""
    return {task for task in asyncio.all_tasks() if "RequestHandler" in repr(task.get_coro())}


class HangingLifespanPlugin:
    """A plugin whose lifespan never finishes opening or closing."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.reached = asyncio.Event()

    @hookimpl
    def workpool_lifespan(self) -> Any:
        return self.hanging_context()

    @asynccontextmanager
    async def hanging_context(self) -> AsyncIterator[None]:
        if self.where == "opening":
            self.reached.set()
            await asyncio.Event().wait()
        yield
        self.reached.set()
        if self.where == "closing":
            await asyncio.Event().wait()


async def test_start_with_hanging_plugin_can_be_cancelled(make_pool: Any) -> None:
    slow = HangingLifespanPlugin("opening")
    supervisor = make_pool(endless_handler, slow)
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(supervisor.__aenter__())
        await slow.reached.wait()
        starting.cancel()
        await asyncio.wait({starting}, timeout=20)
        assert starting.cancelled()


async def test_pool_closes_although_lifespan_of_plugin_never_closes(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workpool.plugins.lifespan.CLOSE_SECONDS", 0.05)
    async with make_pool(endless_handler, HangingLifespanPlugin("closing")):
        pass
    [record] = [each for each in caplog.records if each.message == "plugin did not close"]
    assert vars(record)["plugin"] == "HangingLifespanPlugin"


async def test_drain_writes_metadata_about_release_before_it_abandons_uncancellable_session(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool.pool.handler_executor.REPEAT_SECONDS", 0.05)
    may_end = asyncio.Event()

    @handler
    async def uncancellable_handler(_: Session) -> None:
        while not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await may_end.wait()

    (item,) = control_plane.enqueue()
    async with make_pool(uncancellable_handler, session_timeout=0.05) as supervisor:
        expected = "ignore their cancellation"
        async with asyncio.timeout(20):
            while expected not in str(supervisor.status()):  # noqa: ASYNC110 - a state has no event
                await asyncio.sleep(0.01)
        await supervisor.drain(timeout=LONG_SECONDS)
    may_end.set()
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert (
        "workpool.released"
        in control_plane.operations.get_item(control_plane.environments[0], item.id).metadata
    )
