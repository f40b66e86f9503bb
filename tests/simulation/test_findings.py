"""What the simulation found in the pool, each as a test of its own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from workpool import Session, Settings, handler
from workpool.events import AckFinished, ItemClaimed
from workpool.server import Operations
from workpool.testing import Recorder
from workpool.testing.local import LocalClient, Script, Trouble
from workpool.testing.simulation.case import START
from workpool.testing.simulation.world import ENVIRONMENT, LoopSupervisor
from workpool.testing.virtual import VirtualLoop, in_virtual_time


@handler
async def work(session: Session) -> dict[str, str]:
    await asyncio.sleep(1)
    return {"seen": session.id}


class Bench:
    """A pool on virtual time, what befalls its calls, and what it tells."""

    def __init__(self, script: Script, **values: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.operations = Operations([ENVIRONMENT], now=lambda: START + loop.machine_time())
        self.recorder = Recorder()
        settings = Settings(
            environment_id=ENVIRONMENT, token=ENVIRONMENT, stats_interval=0, **values
        )
        self.supervisor = LoopSupervisor(
            settings,
            plugins=[work, self.recorder],
            connect=partial(LocalClient, self.operations, troubles=script),
        )


@in_virtual_time
async def test_a_drain_does_not_wait_for_an_ack_that_pauses() -> None:
    """Refused with a long `Retry-After`, it slept through the drain and counted as left behind."""
    refusal = Trouble(answer=503, applied=False, retry_after=40)
    bench = Bench(Script(ack=[refusal]), drain_timeout=10)
    async with bench.supervisor as pool:
        bench.operations.enqueue(ENVIRONMENT)
        await bench.recorder.wait_for(ItemClaimed)
        await asyncio.sleep(1)
        began = bench.loop.time()
        await pool.drain()
        assert bench.loop.time() - began < 1
    assert pool.left_behind == 0
    assert [event.result for event in bench.recorder.of(AckFinished)] == ["error"]
