"""Drains of a pool: a deadline never moves to a later time, and stuck sessions are abandoned."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from workpool.events import DrainFinished, DrainStarted
from workpool.pool.drain import AFTER_DEADLINE_SECONDS, Drain, await_despite_cancellation
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event


class DispatcherStandIn:
    """A stand-in for the dispatcher of a pool, with simulated sessions.

    Attributes:
        running: Sessions that have not ended.
        stuck: Sessions whose handler ignores its cancellation.
        cancelled_at: The time at which the handlers were cancelled.
    """

    def __init__(self, running: int = 0) -> None:
        self.loop = asyncio.get_running_loop()
        self.running = running
        self.stuck = 0
        self.cancelled_at: float | None = None
        self.ends_when_cancelled = True
        self.on_closed: Callable[[], None] | None = None
        self.executor: Any = SimpleNamespace(on_stuck=None)
        self.events: list[Event] = []

    def count_unfinished_items(self) -> int:
        return self.running - self.stuck

    async def wait_for_release_marks(self, seconds: float) -> None:
        """Return at once: a simulated session writes no release mark."""

    def simulate_end_of_sessions(self, count: int = 1) -> None:
        self.running -= count
        if self.on_closed is not None:
            self.on_closed()

    def simulate_stuck_session(self) -> None:
        self.stuck += 1
        self.executor.on_stuck()

    def release_all_items(self) -> None:
        self.cancelled_at = self.loop.time()
        if self.ends_when_cancelled:
            self.loop.call_later(1, self.simulate_end_of_sessions, self.running)

    def abandon_items(self) -> int:
        return self.running

    async def run_drain(self, drain: Drain) -> int:
        context: Any = SimpleNamespace(
            observe=lambda kind, *values: self.events.append(kind(*values)),
            queue=SimpleNamespace(running=self.running),
        )
        dispatcher: Any = self
        return await drain.finish_sessions(context, dispatcher)

    @property
    def result_of_finished_drain(self) -> str:
        started, finished = self.events
        assert isinstance(started, DrainStarted)
        assert isinstance(finished, DrainFinished)
        return finished.result


@in_virtual_time
async def test_drain_without_sessions_ends_as_clean_even_with_timeout_zero() -> None:
    drain, sessions = Drain(), DispatcherStandIn()
    drain.request(0)
    assert await sessions.run_drain(drain) == 0
    assert (sessions.result_of_finished_drain, sessions.loop.time()) == ("clean", 0)


@in_virtual_time
async def test_drain_without_a_deadline_waits_for_every_session() -> None:
    drain, sessions = Drain(), DispatcherStandIn(3)
    drain.request(None)
    for seconds in (10, 1_000, 100_000):
        sessions.loop.call_later(seconds, sessions.simulate_end_of_sessions)
    assert await sessions.run_drain(drain) == 0
    assert (sessions.result_of_finished_drain, sessions.cancelled_at) == ("clean", None)
    assert sessions.loop.time() == pytest.approx(100_000)


@in_virtual_time
async def test_drain_cancels_handlers_that_still_run_at_its_deadline() -> None:
    drain, sessions = Drain(), DispatcherStandIn(3)
    drain.request(30)
    assert await sessions.run_drain(drain) == 0
    assert sessions.cancelled_at == pytest.approx(30)
    assert sessions.result_of_finished_drain == "deadline"
    assert sessions.loop.time() == pytest.approx(31)


@pytest.mark.parametrize("first", [None, 1000.0])
@pytest.mark.parametrize("second", [0, 20.0])
def test_second_drain_shortens_deadline(first: float | None, second: float) -> None:
    @in_virtual_time
    async def run_drain_with_two_requests() -> None:
        drain, sessions = Drain(), DispatcherStandIn(1)
        drain.request(first)
        sessions.loop.call_later(5, drain.request, second)
        await sessions.run_drain(drain)
        assert sessions.cancelled_at == pytest.approx(5 + second)
        assert drain.timeout == first

    run_drain_with_two_requests()


@pytest.mark.parametrize("second", [None, 1000.0, 30.0])
def test_second_drain_never_extends_deadline(second: float | None) -> None:
    @in_virtual_time
    async def run_drain_with_later_second_request() -> None:
        drain, sessions = Drain(), DispatcherStandIn(1)
        drain.request(20)
        sessions.loop.call_later(5, drain.request, second)
        await sessions.run_drain(drain)
        assert sessions.cancelled_at == pytest.approx(20)

    run_drain_with_later_second_request()


@in_virtual_time
async def test_drain_ends_at_once_when_last_running_session_becomes_stuck() -> None:
    drain, sessions = Drain(), DispatcherStandIn(1)
    drain.request(None)
    sessions.loop.call_later(7, sessions.simulate_stuck_session)
    assert await sessions.run_drain(drain) == 1
    assert sessions.loop.time() == pytest.approx(7)
    assert (sessions.result_of_finished_drain, sessions.cancelled_at) == ("killed", None)


@in_virtual_time
async def test_drain_abandons_sessions_that_still_run_after_cancellation_at_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drain, sessions = Drain(), DispatcherStandIn(2)
    sessions.ends_when_cancelled = False
    drain.request(10)
    assert await sessions.run_drain(drain) == 2
    assert sessions.loop.time() == pytest.approx(10 + AFTER_DEADLINE_SECONDS)
    assert sessions.result_of_finished_drain == "killed"
    [record] = [each for each in caplog.records if each.message == "drained"]
    assert (record.levelname, vars(record)["abandoned"]) == ("ERROR", 2)


@in_virtual_time
async def test_cancelled_drain_leaves_no_task_running() -> None:
    drain, sessions = Drain(), DispatcherStandIn(1)
    drain.request(None)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(sessions.run_drain(drain))
        await asyncio.sleep(1)
        waiting.cancel()
    assert waiting.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@in_virtual_time
async def test_second_drain_request_leaves_start_time_and_timeout_unchanged() -> None:
    drain = Drain()
    await asyncio.sleep(3)
    assert drain.started_at is None
    assert not drain.requested.is_set()
    drain.request(7)
    await asyncio.sleep(1)
    drain.request(3)
    assert drain.requested.is_set()
    assert drain.timeout == 7
    assert drain.started_at == pytest.approx(3)


@in_virtual_time
async def test_cancelled_pool_task_ends_pool_before_it_raises_cancelled_error() -> None:
    drain, ended = Drain(), list[str]()

    async def end_pool_after_drain_request() -> None:
        await drain.requested.wait()
        await asyncio.sleep(10)
        ended.append("ended")

    async with asyncio.TaskGroup() as group:
        task = group.create_task(await_despite_cancellation(end_pool_after_drain_request, drain))
        for _ in range(3):
            await asyncio.sleep(1)
            task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    assert ended == ["ended"]
    assert drain.timeout == 0


@in_virtual_time
async def test_pool_that_ends_without_cancellation_requests_no_drain() -> None:
    drain = Drain()
    await await_despite_cancellation(lambda: asyncio.sleep(1), drain)
    assert not drain.requested.is_set()
