"""The drain: when it ends, and what is done with the sessions until then and after it.

Its deadline may come nearer and never goes away again (design §1, Drain). Lives on the handlers'
loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from workpool.events import DrainFinished, DrainStarted

if TYPE_CHECKING:
    from workpool.events import DrainResult
    from workpool.pool.dispatch import Dispatcher
    from workpool.pool.parts import Parts

log = logging.getLogger(__name__)

AFTER_DEADLINE_SECONDS = 5.0
"""How long the finish of what the deadline cancelled may take, all together."""


class Drain:
    """One supervisor's drain.

    Attributes:
        requested: Set once it has begun.
        started_at: On the loop's clock; None before it has begun.
        timeout: Seconds given by whoever asked first; None = no limit.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.started_at: float | None = None
        self.timeout: float | None = None
        self._deadline = math.inf
        self._nearer = asyncio.Event()

    def begin(self, timeout: float | None) -> None:
        """Ask for it; asking again can only bring the deadline nearer."""
        now = asyncio.get_running_loop().time()
        if self.started_at is None:
            self.started_at, self.timeout = now, timeout
            self.requested.set()
        if timeout is not None and now + timeout < self._deadline:
            self._deadline = now + timeout
            self._nearer.set()

    async def wait_for(self, tasks: set[asyncio.Task[None]]) -> bool:
        """Wait for the tasks until the deadline, wherever it moves; False when it came first."""
        loop = asyncio.get_running_loop()
        while tasks:
            left = self._deadline - loop.time()
            if left <= 0:
                return False
            self._nearer.clear()
            async with asyncio.TaskGroup() as group:
                nearer = group.create_task(self._nearer.wait(), name="drain-nearer")
                await asyncio.wait(
                    {nearer, *tasks},
                    timeout=None if left == math.inf else left,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                nearer.cancel()
            tasks = {task for task in tasks if not task.done()}
        return True

    async def wind_down(self, parts: Parts, dispatcher: Dispatcher) -> int:
        """See the sessions to their end; returns how many had to be left behind."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        log.info("draining running=%d timeout=%s", parts.queue.running, self.timeout)
        parts.observe(DrainStarted(self.timeout))
        left: set[asyncio.Task[None]] = set()
        clean = await self.wait_for(set(dispatcher.tasks))
        if not clean:
            dispatcher.release_all()
            _, left = await asyncio.wait(dispatcher.tasks, timeout=AFTER_DEADLINE_SECONDS)
            dispatcher.abandon()
        result: DrainResult = "killed" if left else "clean" if clean else "deadline"
        seconds = loop.time() - started
        level = logging.ERROR if left else logging.INFO
        log.log(level, "drained result=%s seconds=%.1f left_behind=%d", result, seconds, len(left))
        parts.observe(DrainFinished(result, seconds))
        return len(left)
