"""The drain of a pool: waits for the sessions, and releases those still running at the deadline.

The deadline can be brought forward and never postponed. Lives on the handlers' loop.
See workpool/docs/architecture.md, "The drain".
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from workpool.events import DrainFinished, DrainStarted
from workpool.log_fields import pool_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.events import DrainResult
    from workpool.exporter import Exporter
    from workpool.pool.dispatcher import Dispatcher
    from workpool.pool.pool_context import PoolContext

log = pool_logger(__name__)

AFTER_DEADLINE_SECONDS = 5.0
"""Seconds after the deadline for the completion of all cancelled sessions."""
SCRAPED_SECONDS = 120.0
"""A process without a scrape for this long, in seconds, counts as not scraped."""
LAST_SCRAPE_SECONDS = 20.0
"""Longest wait of the exporter for the scrape that follows the drain, in seconds."""
GRACE_SECONDS = 28.0
"""The wait for that scrape ends this many seconds after `drain_timeout`.

That is 2 s before the end of the grace period. See workpool/docs/operating.md, "Deploy".
"""


class Drain:
    """The drain of one supervisor: its beginning, its deadline, and how often it was requested.

    Attributes:
        requested: Set once the drain has begun.
        started_at: The time at which the drain began, on the loop's clock; None before that.
        timeout: The time limit in seconds that the first request set; None = no limit.
        requests: The number of times that the drain was requested.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.started_at: float | None = None
        self.timeout: float | None = None
        self.requests = 0
        self._deadline = math.inf
        self._changed = asyncio.Event()

    @property
    def deadline(self) -> float:
        """The loop time at which running handlers are cancelled; infinite while none is set."""
        return self._deadline

    def request(self, timeout: float | None) -> None:
        """Begin the drain; if it has begun already, only shorten its deadline."""
        now = asyncio.get_running_loop().time()
        self.requests += 1
        if self.started_at is None:
            self.started_at, self.timeout = now, timeout
            self.requested.set()
        if timeout is not None and now + timeout < self._deadline:
            self._deadline = now + timeout
        self.wake_waiters()

    def wake_waiters(self) -> None:
        """Wake the tasks that wait in this drain, for example after the end of an item."""
        self._changed.set()

    async def wait_until_sessions_end(self, dispatcher: Dispatcher) -> None:
        """Wait, without a time limit, until no session runs except those of stuck handlers."""
        await self._wait_until_items_finished(dispatcher, lambda: math.inf)

    async def finish_sessions(self, context: PoolContext, dispatcher: Dispatcher) -> int:
        """Wait for the running sessions; at the deadline, cancel them and release their items.

        Returns the number of sessions that did not end even then, and were abandoned.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        log.info("draining", extra={"running": context.queue.running, "timeout": self.timeout})
        context.observe(DrainStarted, self.timeout)
        clean = await self._wait_until_items_finished(dispatcher, lambda: self._deadline)
        until = loop.time() + AFTER_DEADLINE_SECONDS
        if not clean:
            dispatcher.release_all_items()
            await self._wait_until_items_finished(dispatcher, lambda: until)
        await dispatcher.wait_for_release_marks(until - loop.time())
        abandoned = dispatcher.abandon_items()
        result: DrainResult = "killed" if abandoned else "clean" if clean else "deadline"
        seconds = loop.time() - started
        level = logging.ERROR if abandoned else logging.INFO
        log.log(
            level,
            "drained",
            extra={"result": result, "seconds": round(seconds, 3), "abandoned": abandoned},
        )
        context.observe(DrainFinished, result, seconds)
        return abandoned

    async def wait_for_last_scrape(self, exporter: Exporter) -> None:
        """Wait until the metrics of the drained pool have been scraped once more.

        Returns at once if nothing scrapes the process, on a further request to drain, and at the
        end of the grace period.
        """
        since = time.monotonic()
        if exporter.scraped_at is None or since - exporter.scraped_at > SCRAPED_SECONDS:
            return
        loop, requests = asyncio.get_running_loop(), self.requests
        seconds = LAST_SCRAPE_SECONDS
        if self.timeout is not None and self.started_at is not None:
            seconds = min(seconds, self.started_at + self.timeout + GRACE_SECONDS - loop.time())
        log.info("waiting for the last scrape", extra={"wait_seconds": round(seconds, 1)})
        on_scraped = partial(loop.call_soon_threadsafe, self.wake_waiters)
        exporter.on_scraped.add(on_scraped)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while (exporter.scraped_at or 0.0) < since and self.requests == requests:
                        self._changed.clear()
                        await self._changed.wait()
        finally:
            exporter.on_scraped.discard(on_scraped)

    async def _wait_until_items_finished(
        self, dispatcher: Dispatcher, until: Callable[[], float]
    ) -> bool:
        """Wait until all items have ended except those of stuck handlers.

        Args:
            dispatcher: The owner of the items.
            until: Returns the time at which the wait ends, on the loop's clock. Called again after
                each change, because a further request may shorten the deadline.

        Returns:
            False if that time came first.
        """
        dispatcher.on_closed = dispatcher.executor.on_stuck = self.wake_waiters
        loop = asyncio.get_running_loop()
        while dispatcher.count_unfinished_items():
            left = until() - loop.time()
            if left <= 0:
                return False
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if left == math.inf else left):
                    await self._changed.wait()
        return True


async def await_despite_cancellation(end: Callable[[], Awaitable[None]], drain: Drain) -> None:
    """Await `end()` completely even if this task is cancelled; then raise the last CancelledError.

    A cancellation moves the drain's deadline to now, so that `end()` ends soon. Without this
    function, a pool could outlive its embedder: some libraries cancel a task again at every await.
    """
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await end()
            break
        except asyncio.CancelledError as error:
            drain.request(0)
            cancelled = error
    if cancelled is not None:
        raise cancelled
