"""The polls that wait for an item, and their wake-ups.

A waiting poll does not check the queue periodically. It sleeps until an item becomes claimable, or
until the time at which one will. A poll that cannot use its wake-up passes it on, so that no item
stays claimable while a poll waits.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import NamedTuple, TypeAlias

from workpool.wire.protocol import RECLAIM_OLDER_THAN_MS

Waiter: TypeAlias = "asyncio.Future[None]"


class Poll(NamedTuple):
    """The parameters of a poll. If `block_ms` is 0, the poll does not wait for an item."""

    worker_id: str | None = None
    block_ms: int = 0
    reclaim_older_than_ms: int = RECLAIM_OLDER_THAN_MS


class WaitingPolls:
    """The waiting polls of one environment on one event loop, woken in order of arrival."""

    def __init__(self) -> None:
        self._waiters: OrderedDict[Waiter, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait_until_woken(self, seconds: float, *, reclaiming: bool) -> None:
        """Sleep until the poll is woken, but not longer than `seconds`.

        `reclaiming`: an item that is delivered from now on may become claimable for this poll while
        the poll waits.
        """
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters[waiter] = reclaiming
        timer = loop.call_later(seconds, _wake_waiter, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            # This poll was woken for an item before it was cancelled: wake the next poll instead.
            if waiter.done() and not waiter.cancelled():
                self.wake_polls(1)
            raise
        finally:
            timer.cancel()
            self._waiters.pop(waiter, None)

    def wake_polls(self, count: int) -> None:
        """Wake the first `count` waiting polls, one for each item that became claimable."""
        while count > 0 and self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def wake_polls_that_may_reclaim(self) -> None:
        """Wake the polls that wait longer than their redelivery time: they may reclaim an item."""
        for waiter, reclaiming in self._waiters.items():
            if reclaiming:
                _wake_waiter(waiter)


def _wake_waiter(waiter: Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)
