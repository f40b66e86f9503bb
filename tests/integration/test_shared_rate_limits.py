"""Pools of one account share its rate limits although each pool runs on its own thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from workpool import RateLimits, Session, Supervisor, handler
from workpool.wire.http.call_options import Priority
from workpool.wire.http.rate_limiter import RateLimiter

if TYPE_CHECKING:
    from workpool.server import ControlPlane

WRITE_RATE, ITEMS = 30.0, 24


class ThreadRecordingLimiter(RateLimiter):
    """A rate limiter that records the threads that acquire tokens."""

    def __init__(self, rate: float) -> None:
        super().__init__("write", rate)
        self.threads: Counter[str] = Counter()

    def try_acquire(self, priority: Priority = Priority.HANDLER) -> bool:
        self.threads[threading.current_thread().name] += 1
        return super().try_acquire(priority)


@handler
async def return_at_once(_: Session) -> None:
    return None


async def test_two_pools_on_two_threads_share_one_rate_limit(
    control_plane: ControlPlane, make_settings: Any
) -> None:
    limits = RateLimits(0, WRITE_RATE)
    limits.write = watched = ThreadRecordingLimiter(WRITE_RATE)
    settings = make_settings()
    ready = threading.Barrier(2)

    async def run_until_empty() -> None:
        pool = Supervisor(settings, plugins=[return_at_once], rate_limits=limits)
        await asyncio.to_thread(ready.wait, 20)
        await pool.run(until_empty=True)

    control_plane.enqueue(ITEMS)
    began = time.monotonic()
    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(asyncio.to_thread(asyncio.run, run_until_empty()))
    writes = 2 * ITEMS  # Each item needs one ack and one stop.
    assert len(watched.threads) == 2
    assert time.monotonic() - began >= (writes - WRITE_RATE / 4) / WRITE_RATE
