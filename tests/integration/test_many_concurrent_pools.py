"""Five hundred concurrent pools, each started, drained or cancelled at its own random time."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.integration.condition_polling import wait_until
from tests.integration.test_embedded_pool import (
    await_and_ignore_lookup_error,
    open_file_count,
    workpool_threads,
)
from workpool import Session, Supervisor, handler

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Clock

POOLS = 500
SPREAD_SECONDS = 8.0
"""Period over which the random times are spread; a start is slow when all pools start at once."""


@handler
async def wait_briefly(session: Session) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await session.interrupted()


async def run_pool(supervisor: Supervisor, dice: random.Random, end: str) -> None:
    """Run one pool; `end` says whether a drain, an error or a cancellation ends it."""
    await asyncio.sleep(dice.uniform(0, SPREAD_SECONDS / 2))
    async with supervisor:
        await asyncio.sleep(dice.uniform(0, SPREAD_SECONDS / 4))
        if end == "drain":
            await supervisor.drain(dice.choice([0, 0.1, 5]))
        elif end == "raise":
            raise LookupError
        elif end == "stay":
            await asyncio.sleep(3600)


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_five_hundred_concurrent_pools_leave_no_task_or_thread(
    control_plane: ControlPlane, clock: Clock, make_settings: Callable[..., Settings]
) -> None:
    dice = random.Random(3)  # noqa: S311 - repeatable, guards nothing
    settings = make_settings(drain_timeout=2, concurrency=2)
    async with Supervisor(settings, plugins=[wait_briefly]):
        pass  # A first pool fills caches before files and threads are counted below.
    gc.collect()
    files, tasks, threads = open_file_count(), asyncio.all_tasks(), threading.active_count()
    control_plane.enqueue(count=200)
    ends = [dice.choice(["drain", "leave", "raise", "stay"]) for _ in range(POOLS)]
    async with asyncio.TaskGroup() as group:
        pool_tasks = [
            group.create_task(
                await_and_ignore_lookup_error(
                    run_pool(Supervisor(settings, plugins=[wait_briefly]), dice, end)
                )
            )
            for end in ends
        ]
        for task, end in zip(pool_tasks, ends, strict=True):
            if end == "stay" or dice.random() < 0.2:
                asyncio.get_running_loop().call_later(dice.uniform(0, SPREAD_SECONDS), task.cancel)
    assert not workpool_threads()
    await wait_until(lambda: threading.active_count() <= threads)
    await wait_until(lambda: asyncio.all_tasks() <= tasks)
    gc.collect()
    await wait_until(lambda: open_file_count() <= files)
    # The leases of the ended pools expire, so that another pool can finish the items.
    clock.advance(60)
    await Supervisor(make_settings(concurrency=16), plugins=[wait_briefly]).run(until_empty=True)
    totals = control_plane.summary()
    assert (totals.stopped, totals.overlapping) == (200, 0)
