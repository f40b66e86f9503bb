"""The times at which the deletion cost is written: rate, order and failures, in virtual time."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from workpool.testing import in_virtual_time
from workpool_kubernetes.api_server import APIServerError
from workpool_kubernetes.cost_writer import BACKOFF_SECONDS, LOOK_SECONDS, CostWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest


class Written:
    """A cost writer, its cost, and a record of its writes with their times."""

    def __init__(self, interval: float = 5.0) -> None:
        self.cost = 0
        self.written: list[tuple[float, int]] = []
        self.failing = False
        self.seconds = 0.0
        self.writer = CostWriter(lambda: self.cost, self._record_write, interval)

    async def _record_write(self, cost: int) -> None:
        self.written.append((asyncio.get_running_loop().time(), cost))
        await asyncio.sleep(self.seconds)
        if self.failing:
            raise APIServerError("down")

    def set(self, cost: int) -> None:
        self.cost = cost
        self.writer.look()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.writer.run())
            await asyncio.sleep(0.001)
            try:
                yield
            finally:
                task.cancel()


@in_virtual_time
async def test_cost_is_written_at_start_and_then_only_when_it_changes() -> None:
    state = Written()
    async with state.running():
        await asyncio.sleep(1000)
        state.set(0)
        await asyncio.sleep(10)
        assert state.written == [(0.0, 0)]
        state.set(2)
        await asyncio.sleep(0.001)
        assert [cost for _, cost in state.written] == [0, 2]


@in_virtual_time
async def test_costs_that_change_quickly_are_written_once_per_interval_with_last_value() -> None:
    state = Written(interval=5.0)
    async with state.running():
        for cost in range(1, 100):
            state.set(cost)
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
    times = [at for at, _ in state.written]
    assert all(later - earlier >= 5.0 for earlier, later in pairwise(times))
    assert len(state.written) <= 4
    assert state.written[-1][1] == 99


@in_virtual_time
async def test_cost_that_changes_while_a_write_is_under_way_is_written_afterwards() -> None:
    state = Written()
    state.seconds = 8.0
    async with state.running():
        state.set(3)
        await asyncio.sleep(40)
    assert [cost for _, cost in state.written] == [0, 3]


@in_virtual_time
async def test_cost_that_returns_to_its_value_within_the_interval_is_not_written() -> None:
    state = Written()
    async with state.running():
        state.set(1)
        state.set(0)
        await asyncio.sleep(20)
    assert state.written == [(0.0, 0)]


@in_virtual_time
async def test_change_without_an_event_is_written_within_half_a_minute() -> None:
    state = Written()
    async with state.running():
        await asyncio.sleep(10)
        state.cost = 4
        await asyncio.sleep(LOOK_SECONDS + 1)
    assert state.written[-1][1] == 4


@in_virtual_time
async def test_failing_writes_are_repeated_at_growing_bounded_distances(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    state = Written(interval=5.0)
    state.failing = True
    async with state.running():
        await asyncio.sleep(3600)
        times = [at for at, _ in state.written]
        distances = [later - earlier for earlier, later in pairwise(times)]
        assert distances[0] >= 5.0
        assert max(distances) > 100
        assert max(distances) <= BACKOFF_SECONDS
        assert 10 < len(times) < 40
        state.failing = False
        await asyncio.sleep(BACKOFF_SECONDS)
        assert len(state.written) == len(times) + 1
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == len(times)
    assert caplog.records[-1].message == "deletion cost written again"


@in_virtual_time
async def test_value_is_written_again_after_a_failed_write_of_another() -> None:
    """The failed write may have been applied: only its answer is missing."""
    state = Written()
    async with state.running():
        await asyncio.sleep(10)
        state.failing = True
        state.set(1)
        await asyncio.sleep(1)
        state.failing = False
        state.set(0)
        await asyncio.sleep(60)
    assert [cost for _, cost in state.written] == [0, 1, 0]
