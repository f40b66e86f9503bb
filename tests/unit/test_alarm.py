"""The sleep between two beats: as long as asked, or until somebody rings."""

from __future__ import annotations

import asyncio

from workpool.pool.beats import Alarm

LONG = 60.0


async def test_it_sleeps_for_so_long() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    await Alarm().sleep(0.05)
    assert loop.time() - before >= 0.04
    await Alarm().sleep(-1.0)


async def test_a_ring_wakes_the_sleeper_once() -> None:
    alarm = Alarm()
    async with asyncio.TaskGroup() as group:
        sleeper = group.create_task(alarm.sleep(LONG))
        await asyncio.sleep(0)
        alarm.ring()
        alarm.ring()
        await sleeper
        again = group.create_task(alarm.sleep(LONG))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not again.done()
        alarm.ring()


async def test_a_ring_while_nobody_sleeps_ends_the_next_sleep_at_once() -> None:
    alarm = Alarm()
    alarm.ring()
    await asyncio.wait_for(alarm.sleep(LONG), 5)


async def test_a_cancelled_sleeper_leaves_nothing_behind() -> None:
    alarm = Alarm()
    async with asyncio.TaskGroup() as group:
        sleeper = group.create_task(alarm.sleep(LONG))
        await asyncio.sleep(0)
        sleeper.cancel()
    assert sleeper.cancelled()
    alarm.ring()
    await asyncio.wait_for(alarm.sleep(LONG), 5)
