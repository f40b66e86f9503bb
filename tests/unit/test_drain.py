"""A drain's deadline only ever comes nearer."""

from __future__ import annotations

import asyncio

import pytest

from workpool.pool.drain import Drain


async def forever() -> None:
    await asyncio.Event().wait()


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_nothing_to_wait_for_is_a_clean_end_even_at_the_deadline() -> None:
    drain = Drain()
    drain.begin(0)
    assert await drain.wait_for(set)


async def test_it_waits_for_the_tasks() -> None:
    drain = Drain()
    drain.begin(None)
    done = asyncio.Event()

    async def until_done() -> None:
        await done.wait()

    async with asyncio.TaskGroup() as group:
        tasks = {group.create_task(until_done()) for _ in range(3)}
        waiting = group.create_task(
            drain.wait_for(lambda: {task for task in tasks if not task.done()})
        )
        await turn()
        assert not waiting.done()
        done.set()
        assert await waiting


async def test_it_ends_at_the_deadline() -> None:
    drain = Drain()
    drain.begin(0.01)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(forever())
        assert not await drain.wait_for(lambda: {task})
        task.cancel()


@pytest.mark.parametrize("first", [None, 1000.0])
async def test_asked_for_again_it_ends_sooner(first: float | None) -> None:
    drain = Drain()
    drain.begin(first)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(forever())
        waiting = group.create_task(drain.wait_for(lambda: {task}))
        await turn()
        assert not waiting.done()
        drain.begin(0)
        assert not await waiting
        task.cancel()
    assert drain.timeout == first


@pytest.mark.parametrize("later", [None, 1000.0])
async def test_asked_for_again_it_never_ends_later(later: float | None) -> None:
    drain = Drain()
    drain.begin(0)
    drain.begin(later)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(forever())
        assert not await drain.wait_for(lambda: {task})
        task.cancel()
    assert drain.timeout == 0


async def test_it_leaves_no_task_when_the_wait_is_cancelled() -> None:
    drain = Drain()
    drain.begin(None)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(forever())
        waiting = group.create_task(drain.wait_for(lambda: {task}))
        await turn()
        waiting.cancel()
        await asyncio.wait({waiting})
        task.cancel()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_it_does_not_wait_for_what_is_given_up_meanwhile() -> None:
    drain = Drain()
    drain.begin(None)
    async with asyncio.TaskGroup() as group:
        tasks = {group.create_task(forever())}
        waiting = group.create_task(drain.wait_for(tasks.copy))
        await turn()
        stuck = tasks.pop()
        drain.look_again()
        assert await waiting
        stuck.cancel()


async def test_it_remembers_who_asked_first() -> None:
    drain = Drain()
    assert drain.started_at is None
    assert not drain.requested.is_set()
    drain.begin(7)
    started = drain.started_at
    drain.begin(3)
    assert drain.requested.is_set()
    assert drain.timeout == 7
    assert drain.started_at == started
