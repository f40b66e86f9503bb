"""Tests of `CostWriter` in virtual time: the rate and order of its writes, and failed writes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from workpool.testing import in_virtual_time
from workpool_kubernetes.api_server import APIServerError
from workpool_kubernetes.cost_writer import MAX_BACKOFF_SECONDS, RECHECK_SECONDS, CostWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest


class WriterTestbed:
    """A `CostWriter` whose cost the test sets, and a list of all writes with their times."""

    def __init__(self, interval: float = 5.0) -> None:
        self.cost = 0
        self.writes: list[tuple[float, int]] = []
        self.failing = False
        self.write_seconds = 0.0
        self.writer = CostWriter(lambda: self.cost, self._record_deletion_cost_write, interval)

    async def _record_deletion_cost_write(self, cost: int) -> None:
        self.writes.append((asyncio.get_running_loop().time(), cost))
        await asyncio.sleep(self.write_seconds)
        if self.failing:
            raise APIServerError("down")

    def set_deletion_cost(self, cost: int) -> None:
        self.cost = cost
        self.writer.request_deletion_cost_update()

    @asynccontextmanager
    async def running_cost_writer(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.writer.write_deletion_cost_changes())
            await asyncio.sleep(0.001)
            try:
                yield
            finally:
                task.cancel()


@in_virtual_time
async def test_deletion_cost_is_written_at_start_and_then_only_when_it_changes() -> None:
    testbed = WriterTestbed()
    async with testbed.running_cost_writer():
        await asyncio.sleep(1000)
        testbed.set_deletion_cost(0)
        await asyncio.sleep(10)
        assert testbed.writes == [(0.0, 0)]
        testbed.set_deletion_cost(2)
        await asyncio.sleep(0.001)
        assert [cost for _, cost in testbed.writes] == [0, 2]


@in_virtual_time
async def test_deletion_cost_that_changes_quickly_is_written_once_per_interval() -> None:
    testbed = WriterTestbed(interval=5.0)
    async with testbed.running_cost_writer():
        for cost in range(1, 100):
            testbed.set_deletion_cost(cost)
            await asyncio.sleep(0.1)
        await asyncio.sleep(10)
    times = [at for at, _ in testbed.writes]
    assert all(later - earlier >= 5.0 for earlier, later in pairwise(times))
    assert len(testbed.writes) <= 4
    assert testbed.writes[-1][1] == 99


@in_virtual_time
async def test_new_deletion_cost_is_written_after_write_in_progress_ends() -> None:
    testbed = WriterTestbed()
    testbed.write_seconds = 8.0
    async with testbed.running_cost_writer():
        testbed.set_deletion_cost(3)
        await asyncio.sleep(40)
    assert [cost for _, cost in testbed.writes] == [0, 3]


@in_virtual_time
async def test_deletion_cost_that_changes_and_changes_back_within_interval_is_not_written() -> None:
    testbed = WriterTestbed()
    async with testbed.running_cost_writer():
        testbed.set_deletion_cost(1)
        testbed.set_deletion_cost(0)
        await asyncio.sleep(20)
    assert testbed.writes == [(0.0, 0)]


@in_virtual_time
async def test_periodic_recheck_writes_deletion_cost_that_changed_without_request() -> None:
    testbed = WriterTestbed()
    async with testbed.running_cost_writer():
        await asyncio.sleep(10)
        testbed.cost = 4
        await asyncio.sleep(RECHECK_SECONDS + 1)
    assert testbed.writes[-1][1] == 4


@in_virtual_time
async def test_failed_write_of_deletion_cost_is_repeated_after_pauses_that_grow_to_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    testbed = WriterTestbed(interval=5.0)
    testbed.failing = True
    async with testbed.running_cost_writer():
        await asyncio.sleep(3600)
        times = [at for at, _ in testbed.writes]
        pauses = [later - earlier for earlier, later in pairwise(times)]
        assert pauses[0] >= 5.0
        assert max(pauses) > 100
        assert max(pauses) <= MAX_BACKOFF_SECONDS
        assert 10 < len(times) < 40
        testbed.failing = False
        await asyncio.sleep(MAX_BACKOFF_SECONDS)
        assert len(testbed.writes) == len(times) + 1
    warnings = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == len(times)
    assert caplog.records[-1].message == "deletion cost written again"


@in_virtual_time
async def test_deletion_cost_is_written_again_after_failed_write_of_different_cost() -> None:
    """A write whose answer is lost counts as failed, but the API server may have applied it."""
    testbed = WriterTestbed()
    async with testbed.running_cost_writer():
        await asyncio.sleep(10)
        testbed.failing = True
        testbed.set_deletion_cost(1)
        await asyncio.sleep(1)
        testbed.failing = False
        testbed.set_deletion_cost(0)
        await asyncio.sleep(60)
    assert [cost for _, cost in testbed.writes] == [0, 1, 0]
