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
    from collections.abc import Awaitable, Callable

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
        self._look_again = asyncio.Event()

    def begin(self, timeout: float | None) -> None:
        """Ask for it; asking again can only bring the deadline nearer."""
        now = asyncio.get_running_loop().time()
        if self.started_at is None:
            self.started_at, self.timeout = now, timeout
            self.requested.set()
        if timeout is not None and now + timeout < self._deadline:
            self._deadline = now + timeout
            self.look_again()

    def look_again(self) -> None:
        """The deadline has moved, or there is less to wait for."""
        self._look_again.set()

    async def wait_for(self, unfinished: Callable[[], set[asyncio.Task[None]]]) -> bool:
        """Wait until nothing is; False when the deadline, wherever it moves, comes first."""
        loop = asyncio.get_running_loop()
        while tasks := unfinished():
            left = self._deadline - loop.time()
            if left <= 0:
                return False
            self._look_again.clear()
            async with asyncio.TaskGroup() as group:
                look = group.create_task(self._look_again.wait(), name="drain-look-again")
                await asyncio.wait(
                    {look, *tasks},
                    timeout=None if left == math.inf else left,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                look.cancel()
        return True

    async def wind_down(self, parts: Parts, dispatcher: Dispatcher) -> int:
        """See the sessions to their end; returns how many had to be left behind."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        log.info("draining running=%d timeout=%s", parts.queue.running, self.timeout)
        parts.observe(DrainStarted(self.timeout))
        dispatcher.on_stuck(self.look_again)
        clean = await self.wait_for(dispatcher.unfinished)
        if not clean:
            dispatcher.release_all()
            if tasks := dispatcher.unfinished():
                await asyncio.wait(tasks, timeout=AFTER_DEADLINE_SECONDS)
        left = dispatcher.abandon()
        result: DrainResult = "killed" if left else "clean" if clean else "deadline"
        seconds = loop.time() - started
        level = logging.ERROR if left else logging.INFO
        log.log(level, "drained result=%s seconds=%.1f left_behind=%d", result, seconds, left)
        parts.observe(DrainFinished(result, seconds))
        return left


async def see_through(end: Callable[[], Awaitable[None]], drain: Drain) -> None:
    """Await `end()` although cancelled, be it again and again; raise that once it is over.

    A cancellation makes the deadline now, so that `end()` is bounded. It must not leave a pool
    behind that goes on without its embedder: some libraries cancel a task at every turn.
    """
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await end()
            break
        except asyncio.CancelledError as error:
            drain.begin(0)
            cancelled = error
    if cancelled is not None:
        raise cancelled
