"""One poller: acquire a place and an ack permit, poll, offer the item, wait as the answer suggests.

A poll only delivers an item, so one that is cancelled costs a redelivery and nothing else.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from workpool.backoff import Backoff
from workpool.errors import (
    ControlPlaneError,
    PollerError,
    RefusedError,
    TransientError,
    UnreadableError,
)
from workpool.events import PollerBackedOff, PollerRestarted, PollFinished

if TYPE_CHECKING:
    from workpool.events import BackoffReason, PollResult
    from workpool.pool.context import PoolContext
    from workpool.pool.dispatcher import Dispatcher
    from workpool.pool.poller_group import PollerGroup
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

PollerState = Literal["polling", "backoff", "waiting_slot", "paused"]

BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
CRASHES = 5
SKIP_SECONDS = 0.02
"""Between a poll that brought an unreadable item and the next one."""
SKIPS = 250
"""So many unreadable items in a row are skipped quickly: as many as one poller can skip before the
control plane delivers the first of them again, after 5 s by default."""


class Poller:
    """One of the pool's pollers.

    Args:
        context: The pool's.
        group: Shared by all pollers of the pool.
        dispatcher: Takes the items.
        number: Its number in the group, from 0; the first one always polls.

    Attributes:
        state: Its current activity, for the gauge.
    """

    def __init__(
        self, context: PoolContext, group: PollerGroup, dispatcher: Dispatcher, number: int
    ) -> None:
        self.state: PollerState = "waiting_slot"
        self._context = context
        self._admission = context.admission
        self._block_ms = context.settings.block_ms
        self._reclaim_older_than_ms = context.settings.reclaim_older_than_ms
        self._group = group
        self._dispatcher = dispatcher
        self._number = number
        self._polled_at = 0.0  # on the loop's clock
        self._sent_at = 0.0  # the same moment on the lease clock
        self._backoff = Backoff(BACKOFF_SECONDS, BACKOFF_CAP_SECONDS)
        self._unreadable = 0  # in a row

    async def run(self) -> None:
        """Poll until cancelled or the group has ended; continue after a few crashes (bugs)."""
        crashes = 0
        while not self._group.ended:
            try:
                await self._once()
                crashes = 0
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                    raise  # any other CancelledError leaked and would end this poller unnoticed
                crashes += 1
                log.exception("poller crashed in_a_row=%d", crashes)
                self._context.observe(PollerRestarted, error)
                if crashes >= CRASHES:
                    fatal = PollerError(f"a poller crashed {crashes} times in a row")
                    fatal.__cause__ = error
                    self._group.fail(fatal)
                    return
                await self._sleep(self._backoff.next())

    async def _once(self) -> None:
        """Reserve a place, poll, offer the item; then wait as long as the answer suggests."""
        if not self._group.has_turn(self._number):
            self.state = "paused"
            await self._group.turn(self._number)  # before `reserve` takes a place from others
        self.state = "waiting_slot"
        await self._context.queue.reserve()
        try:
            item, taken = await self._deliver()
        except UnreadableError as error:
            await self._skip(error)
            return
        except ControlPlaneError as error:
            await self._back_off(error)
            return
        if item is None:
            # Before the pause below, in which the other pollers poll again.
            await self._group.settle_empty()
        if not taken or self._dispatcher.paced:
            # A control plane that does not wait for `block_ms`, or keeps offering what is declined
            # or cannot be claimed, must not make this loop spin.
            await self._sleep(self._rest_of_block())

    async def _deliver(self) -> tuple[WorkItem | None, bool]:
        """Poll as soon as cooldown and rate limit allow, and offer the item.

        Returns:
            The item, and whether it took the reserved place and the ack permit.
        """
        item, taken, permitted = None, False, False
        try:
            self.state = "paused"
            await self._group.cooldown()
            await self._dispatcher.health.admission()
            if self._admission.gated:
                await self._admission.granted()
            await self._context.client.acquire_ack_permit()
            permitted = True
            item = await self._poll()
            taken = item is not None and self._dispatcher.offer(item, self._sent_at)
        finally:
            if not taken:
                self._context.queue.unreserve()
                if permitted:
                    self._context.client.release_ack_permit()
        return item, taken

    async def _poll(self) -> WorkItem | None:
        self.state = "polling"
        loop = asyncio.get_running_loop()
        started = self._polled_at = loop.time()
        self._sent_at = self._context.clock()
        self._group.sent()
        result: PollResult = "error"
        try:
            item = await self._context.client.poll(self._block_ms, self._reclaim_older_than_ms)
            result = "null" if item is None else "item"
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        except TransientError as error:
            if error.reason in {"throttled", "timeout"}:
                result = "throttled" if error.reason == "throttled" else "timeout"
            raise
        finally:
            self._group.answered()
            seconds = loop.time() - started
            self._context.observe(PollFinished, result, seconds)
        self._backoff.reset()
        self._unreadable = 0
        self._group.succeeded(null=item is None)
        return item

    async def _back_off(self, failure: ControlPlaneError) -> None:
        seconds = self._backoff.next()
        reason: BackoffReason = "server_error"
        if isinstance(failure, TransientError):
            if failure.reason == "throttled":
                reason = "throttled"
            elif failure.reason in {"network", "timeout"}:
                reason = "network"
            if failure.retry_after is not None and failure.retry_after > seconds:
                reason, seconds = "retry_after", failure.retry_after
        self._group.failed(failure)
        if isinstance(failure, RefusedError):
            self._context.optional.forget()
        if failure.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._group.throttled()
        if failure.status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            self._group.hold_back(seconds)
        log.warning(
            "poll failed in_a_row=%d backoff=%.1fs error=%s",
            self._backoff.failures,
            seconds,
            failure,
        )
        self._context.observe(PollerBackedOff, reason, seconds)
        await self._sleep(seconds)

    async def _skip(self, failure: UnreadableError) -> None:
        """Leave an item that cannot be read to others, and look for the next one soon.

        It is delivered again and again. If each time cost a back-off, a few such items would stop
        the pool, so the next poll follows at once, which brings another item. A control plane that
        brings nothing else is polled once per `block_ms`.
        """
        self._backoff.reset()
        self._unreadable += 1
        self._group.skipped(failure)
        rest = self._rest_of_block()
        await self._sleep(min(SKIP_SECONDS, rest) if self._unreadable <= SKIPS else rest)

    def _rest_of_block(self) -> float:
        """Seconds until `block_ms` after the last poll; negative if that has passed."""
        return self._polled_at + self._block_ms / 1000 - asyncio.get_running_loop().time()

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.state = "backoff"
            await asyncio.sleep(seconds)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())
