"""The sweeper: one node at a time, in bounded batches, over failures of the database."""

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
async def pools(database_url: str) -> AsyncIterator[tuple[ConnectionPool, ConnectionPool]]:
    pools = ConnectionPool(database_url), ConnectionPool(database_url)
    for pool in pools:
        await pool.open()
    yield pools
    for pool in pools:
        await pool.close()


class Batches:
    """A batch with `left` rows to change, which takes as long as the test wants."""

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


async def test_sweep_repeats_each_batch_until_nothing_is_left(
    pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    lapses, deletions = Batches(25), Batches()
    assert await Sweeper(pools[0], lapses, deletions).sweep()
    assert (lapses.left, lapses.calls, deletions.calls) == (0, 4, 1)


async def test_sweep_ends_before_its_transaction_is_long(
    pools: tuple[ConnectionPool, ConnectionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "_SWEEP_MAX_SECONDS", 0.0)
    lapses, deletions = Batches(25), Batches(25)
    assert await Sweeper(pools[0], lapses, deletions).sweep()
    assert (lapses.left, deletions.left) == (15, 15)


async def test_second_node_does_not_sweep_until_the_first_has_ended(
    pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    slow, other = Batches(5), Batches()
    slow.go_on.clear()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        first = group.create_task(Sweeper(pools[0], slow).sweep())
        await slow.begun.wait()
        assert not await Sweeper(pools[1], other).sweep()
        slow.go_on.set()
        assert await first
    assert await Sweeper(pools[1], other).sweep()
    assert other.calls == 1


async def test_node_that_stops_in_a_sweep_is_followed_by_another(
    pools: tuple[ConnectionPool, ConnectionPool],
) -> None:
    slow = Batches(5)
    slow.go_on.clear()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        first = group.create_task(Sweeper(pools[0], slow).sweep())
        await slow.begun.wait()
        first.cancel()
        await asyncio.wait([first])
        assert await Sweeper(pools[1], Batches()).sweep()


async def test_sweeper_goes_on_after_a_restart_of_the_database(
    own_postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_SECONDS", 0.02)
    pool = ConnectionPool(own_postgres.create_database())
    await pool.open()
    batches = Batches()
    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            task = group.create_task(Sweeper(pool, batches).run())
            await batches.begun.wait()
            await asyncio.to_thread(own_postgres.restart)
            batches.begun.clear()
            await batches.begun.wait()
            task.cancel()
    finally:
        await pool.close()


async def test_defect_in_a_batch_ends_the_sweeper(
    pools: tuple[ConnectionPool, ConnectionPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_SECONDS", 0.02)

    async def fail() -> int:
        raise LookupError("a defect")

    async with asyncio.timeout(SECONDS):
        with pytest.raises(LookupError):
            await Sweeper(pools[0], fail).run()
