"""The task group of handlers can be left or cancelled at any time."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from workpool.pool.handler_executor import open_handler_task_group


@pytest.mark.parametrize("turns", range(4))
async def test_handler_group_cancelled_at_any_point_of_its_start_leaves_no_task(turns: int) -> None:
    """A task that remained would fail later, and no code would retrieve its error."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))

    async def enter_handler_group_and_wait() -> None:
        async with open_handler_task_group():
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        entering = group.create_task(enter_handler_group_and_wait())
        for _ in range(turns):
            await asyncio.sleep(0)
        entering.cancel()
        await asyncio.wait({entering})
    assert entering.cancelled()
    hosts = [task for task in asyncio.all_tasks() if task.get_name() == "workpool-handlers"]
    assert not hosts
    del entering
    # asyncio calls the exception handler above only when a failed task is garbage-collected.
    gc.collect()
    assert not problems


async def test_handler_group_ends_even_if_one_handler_ignores_cancellation() -> None:
    may_end = asyncio.Event()

    async def ignore_cancellation() -> None:
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue

    async with asyncio.timeout(20):
        async with open_handler_task_group() as group:
            task = group.create_task(ignore_cancellation())
            await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()})
    assert task.done()
