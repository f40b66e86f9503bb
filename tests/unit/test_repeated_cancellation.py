"""Repeated cancellation of a handler that ignores its cancellation, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from workpool.handlers import Handler
from workpool.plugins import Plugins
from workpool.pool.handler_executor import HandlerExecutor, open_handler_task_group
from workpool.pool.handler_threads import HandlerThreads
from workpool.pool.pool_item import EndReason
from workpool.session import Session
from workpool.testing.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.unit.conftest import LeaseTestbed
    from workpool.pool.pool_item import PoolItem


class StubbornHandler:
    """A handler that ignores each cancellation until a given time.

    Attributes:
        times: The times of its cancellations, in seconds after its start.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self.times: list[float] = []
        self.began = asyncio.Event()

    async def __call__(self, _: object) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        self.began.set()
        while now() < began + self.until:
            try:
                await asyncio.sleep(began + self.until - now())
            except asyncio.CancelledError:
                self.times.append(round(now() - began, 3))


@asynccontextmanager
async def running_stubborn_handler(
    make_testbed: type[LeaseTestbed], handler: StubbornHandler
) -> AsyncIterator[tuple[HandlerExecutor, PoolItem]]:
    """Run the handler during the `async with` block, then wait until the handler ends."""
    bench = make_testbed()
    context = SimpleNamespace(
        settings=bench.settings,
        plugins=Plugins.load([], [], {}),
        clock=bench.clock,
        observe=bench.record_event,
        renewer=bench.renewer,
        threads=HandlerThreads(1, bench.clock),
    )
    async with (
        open_handler_task_group() as handlers,
        bench.opened_clients(),
        asyncio.TaskGroup() as group,
    ):
        item = await bench.claim_item()
        item.advance_state("started")
        executor = HandlerExecutor(cast("Any", context), handlers)
        call = Handler(
            name="stubborn.run", call=handler, timeout=None, max_sessions=None, plugin="stubborn"
        )
        session = Session(item.work_item, cast("Any", None), redelivered=False)
        group.create_task(executor.run_handler(item, call, session))
        await handler.began.wait()
        yield executor, item


Step = tuple[float, EndReason]


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        ([(0, EndReason.TIMED_OUT)], [0, 10, 20, 30]),
        ([(0, EndReason.TIMED_OUT), (3, EndReason.TIMED_OUT)], [0, 10, 20, 30]),
        ([(0, EndReason.STOP_REQUESTED), (3, EndReason.TIMED_OUT)], [0, 10, 20, 30]),
        ([(0, EndReason.TIMED_OUT), (3, EndReason.LOST)], [0, 3, 10, 20, 30]),
        ([(5, EndReason.DRAINED), (5, EndReason.LOST)], [5, 5, 15, 25]),
    ],
    ids=["once", "same reason", "less grave", "graver", "graver at once"],
)
@in_virtual_time
async def test_handler_is_cancelled_again_every_ten_seconds_and_at_once_for_graver_reason(
    make_testbed: type[LeaseTestbed], steps: list[Step], times: list[float]
) -> None:
    handler = StubbornHandler(until=34)
    async with running_stubborn_handler(make_testbed, handler) as (executor, item):
        passed = 0.0
        for at, reason in steps:
            await asyncio.sleep(at - passed)
            passed = at
            executor.cancel_handler(item, reason)
    assert handler.times == times
    assert not executor.stuck


@in_virtual_time
async def test_stuck_handler_is_reported_exactly_once_and_ten_seconds_after_cancellation(
    make_testbed: type[LeaseTestbed], caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[float] = []
    handler = StubbornHandler(until=34)
    async with running_stubborn_handler(make_testbed, handler) as (executor, item):
        now: Callable[[], float] = asyncio.get_running_loop().time
        began = now()
        executor.on_stuck = lambda: reports.append(round(now() - began, 3))
        executor.cancel_handler(item, EndReason.TIMED_OUT)
    assert reports == [10]
    assert caplog.text.count("handler ignores its cancellation") == 1


@in_virtual_time
async def test_handler_that_has_ended_is_not_cancelled_again(
    make_testbed: type[LeaseTestbed],
) -> None:
    handler = StubbornHandler(until=12)
    async with running_stubborn_handler(make_testbed, handler) as (executor, item):
        executor.cancel_handler(item, EndReason.TIMED_OUT)
        task = item.handler_task
        assert task is not None
        await asyncio.wait({task})
        executor.cancel_handler(item, EndReason.LOST)
        await asyncio.sleep(30)
    assert handler.times == [0, 10]
    assert task.cancelling() == 2
