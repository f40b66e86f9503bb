"""Tests of the sweeper: one node at a time sweeps, in bounded batches, and survives failures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from workpool.server.postgres import sweeper
from workpool.server.postgres.connection_pool import ConnectionPool
from workpool.server.postgres.sweeper import Sweeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.postgres.cluster import Cluster

SECONDS = 45.0


@pytest.fixture
async def connection_pools(
    database_url: str,
) -> AsyncIterator[tuple[ConnectionPool, ConnectionPool]]:
    connection_pools = ConnectionPool(database_url), ConnectionPool(database_url)
    for pool in connection_pools:
        await pool.open()
    yield connection_pools
    for pool in connection_pools:
        await pool.close()


class FakeSweepBatch:
    """A fake batch with `left` rows to change. A call of it waits until `go_on` is set."""

    def __init__(self, left: int = 0) -> None:
        self.left = left
        self.calls = 0
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self) -> int:
        self.calls += 1
        self.begun.set()
        await self.go_on.wait()
        changed = min(self.left, 10)
        self.left -= changed
        return changed


async def test_sweep_repeats_each_kind_of_batch_until_no_row_is_left(
    connection_pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    lapses, deletions = FakeSweepBatch(25), FakeSweepBatch()
    assert await Sweeper(connection_pools[0], lapses, deletions).sweep()
    assert (lapses.left, lapses.calls, deletions.calls) == (0, 4, 1)


async def test_sweep_that_exceeded_its_time_limit_runs_each_kind_of_batch_once(
    connection_pools: tuple[ConnectionPool, ConnectionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "_SWEEP_MAX_SECONDS", 0.0)
    lapses, deletions = FakeSweepBatch(25), FakeSweepBatch(25)
    assert await Sweeper(connection_pools[0], lapses, deletions).sweep()
    assert (lapses.left, deletions.left) == (15, 15)


async def test_node_does_not_sweep_while_another_node_sweeps(
    connection_pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    slow, other = FakeSweepBatch(5), FakeSweepBatch()
    slow.go_on.clear()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        first = group.create_task(Sweeper(connection_pools[0], slow).sweep())
        await slow.begun.wait()
        assert not await Sweeper(connection_pools[1], other).sweep()
        slow.go_on.set()
        assert await first
    assert await Sweeper(connection_pools[1], other).sweep()
    assert other.calls == 1


async def test_sweeper_runs_batches_after_sweep_of_another_node_was_cancelled(
    connection_pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    slow = FakeSweepBatch(5)
    slow.go_on.clear()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        first = group.create_task(Sweeper(connection_pools[0], slow).sweep())
        await slow.begun.wait()
        first.cancel()
        await asyncio.wait([first])
        # The database ends the lock once it notices that the connection has closed.
        async with connection_pools[1].transaction() as connection:
            await connection.execute(f"SELECT pg_advisory_xact_lock({sweeper.ADVISORY_LOCK})")
        assert await Sweeper(connection_pools[1], FakeSweepBatch()).sweep()


async def test_sweeper_continues_after_a_restart_of_the_database(
    dedicated_postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_SECONDS", 0.02)
    pool = ConnectionPool(dedicated_postgres.create_database())
    await pool.open()
    batches = FakeSweepBatch()
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            task = group.create_task(Sweeper(pool, batches).run())
            await batches.begun.wait()
            await asyncio.to_thread(dedicated_postgres.restart)
            batches.begun.clear()
            await batches.begun.wait()
            task.cancel()
    finally:
        await pool.close()


async def test_sweeper_ends_after_unexpected_error_in_a_batch(
    connection_pools: tuple[ConnectionPool, ConnectionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_SECONDS", 0.02)

    async def raise_error_in_batch() -> int:
        raise LookupError("a defect")

    async with asyncio.timeout(SECONDS):
        with pytest.raises(LookupError):
            await Sweeper(connection_pools[0], raise_error_in_batch).run()
