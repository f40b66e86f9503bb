"""Polling: claim items, a place reserved for each, and keep calm when the control plane does not.

Owns when to poll and how long to back off; never what becomes of an item. A poll only delivers, so
one that is cancelled costs an item a redelivery, nothing more (protocol §3.1, design §1, §2).
"""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from workpool.backoff import Backoff
from workpool.errors import ControlPlaneError, PollerError, TransientError, WorkpoolError
from workpool.events import PollerBackedOff, PollerRestarted, PollFinished
from workpool.pool.scaling import Scaling

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import BackoffReason, PollResult
    from workpool.pool.dispatch import Dispatcher
    from workpool.pool.parts import Parts
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

PollerState = Literal["polling", "backoff", "waiting_slot", "paused"]

BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
REFUSED_SECONDS = 300.0
"""How long a control plane that has accepted us before may refuse us."""
CRASHES = 5


class Polling:
    """What the pollers of one pool share: the gate, and what their answers say together.

    Attributes:
        until_empty: End at the first null poll while nothing of ours waits, runs or is in flight.
        ended: That poll has been; there shall be no other.
        scaling: How many of the pollers poll.
        last_success_at: Of the last answered poll, on the lease clock; None before the first.
        refused: The control plane's last word was a refusal.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        until_empty: bool,
        on_fatal: Callable[[WorkpoolError], None],
        on_empty: Callable[[], None],
    ) -> None:
        self.until_empty = until_empty
        self.ended = False
        self.scaling = Scaling(parts.settings.pollers, parts.observe)
        self.last_success_at: float | None = None
        self.refused = False
        self.fail = on_fatal
        self._on_empty = on_empty
        self._parts = parts
        self._refused_since: float | None = None
        self._gate_opens_at = 0.0  # on the loop's clock
        self._in_flight = 0
        self._answered = asyncio.Event()
        self._idle = False

    async def pass_gate(self) -> None:
        """Wait while a 429 or 503, met by any poller, holds all of them back."""
        loop = asyncio.get_running_loop()
        while True:
            seconds = self._gate_opens_at - loop.time()
            if seconds <= 0:
                return
            await asyncio.sleep(seconds)  # meanwhile it may be closed for longer

    def close_gate(self, seconds: float) -> None:
        """Hold all pollers back for `seconds` from now."""
        opens_at = asyncio.get_running_loop().time() + seconds
        self._gate_opens_at = max(self._gate_opens_at, opens_at)

    def sent(self) -> None:
        """A poll is in flight."""
        self._in_flight += 1

    def answered(self) -> None:
        """A poll is not in flight any more."""
        self._in_flight -= 1
        self._answered.set()
        self._answered = asyncio.Event()

    def succeeded(self, *, null: bool) -> None:
        """A poll was answered as it should be."""
        self.last_success_at = self._parts.clock()
        self.refused = False
        self._refused_since = None
        if null:
            self.scaling.null()
        else:
            self.scaling.hit()
        idle = null and self._parts.queue.idle
        if idle and not self._idle:  # once when idleness starts, not once per poll
            log.info("idle; waiting for work")
        self._idle = idle

    def note_refusal(self, error: ControlPlaneError) -> None:
        """A poll was refused: fatal before the first success, or when it goes on."""
        self.refused = True
        now = self._parts.clock()
        if self._refused_since is None:
            self._refused_since = now
        if self.last_success_at is None or now - self._refused_since >= REFUSED_SECONDS:
            self.fail(error)

    async def settle_empty(self) -> None:
        """After a null: end if the queue is empty for sure, else wait for the other polls."""
        if not (self.until_empty and self._parts.queue.idle):
            return
        if self._in_flight == 0:
            self.ended = True
            self._on_empty()
        else:
            await self._answered.wait()  # bounded: so is every poll


class Poller:
    """One of the pool's pollers.

    Args:
        parts: The pool's.
        polling: What it shares with its siblings.
        dispatcher: Takes what it brings.
        number: Its place among them, from 0; the first one always polls.

    Attributes:
        state: What it does now, for the gauge.
    """

    def __init__(self, parts: Parts, polling: Polling, dispatcher: Dispatcher, number: int) -> None:
        self.state: PollerState = "waiting_slot"
        self._parts = parts
        self._block_ms = parts.settings.block_ms
        self._reclaim_older_than_ms = parts.settings.reclaim_older_than_ms
        self._polling = polling
        self._dispatcher = dispatcher
        self._number = number
        self._polled_at = 0.0  # on the loop's clock
        self._backoff = Backoff(BACKOFF_SECONDS, BACKOFF_CAP_SECONDS)

    async def run(self) -> None:
        """Poll until cancelled or done; a crash is a bug, said loudly, and survived a few times."""
        crashes = 0
        while not self._polling.ended:
            try:
                await self._once()
                crashes = 0
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                    raise  # any other has leaked, and would end this poller unseen
                crashes += 1
                log.exception("poller crashed in_a_row=%d", crashes)
                self._parts.observe(PollerRestarted(error))
                if crashes >= CRASHES:
                    fatal = PollerError(f"a poller crashed {crashes} times in a row")
                    fatal.__cause__ = error
                    self._polling.fail(fatal)
                    return
                await self._sleep(self._backoff.next())

    async def _once(self) -> None:
        """Reserve, poll, hand over; then wait as long as the answer suggests."""
        if not self._polling.scaling.has_turn(self._number):
            self.state = "paused"
            await self._polling.scaling.turn(self._number)  # before it takes a place from others
        self.state = "waiting_slot"
        await self._parts.queue.reserve()
        try:
            item, taken = await self._deliver()
        except ControlPlaneError as error:
            await self._back_off(error)
            return
        if item is None:
            # Before the pause: in there, the others poll again, and so would we, for ever.
            await self._polling.settle_empty()
        if not taken:
            # A control plane that does not wait for `block_ms`, or keeps offering what we do not
            # want, must not spin us.
            now = asyncio.get_running_loop().time()
            await self._sleep(self._polled_at + self._block_ms / 1000 - now)

    async def _deliver(self) -> tuple[WorkItem | None, bool]:
        """Poll and hand over what came; returns it, and whether it took the reserved place."""
        item, taken = None, False
        try:
            item = await self._claim()
            taken = item is not None and self._dispatcher.offer(item)
        finally:
            if not taken:
                self._parts.queue.unreserve()
                if item is not None:
                    self._parts.calls.release_ack_permit()
        return item, taken

    async def _claim(self) -> WorkItem | None:
        """Poll as soon as gate and budget allow, with the acknowledgement paid for in advance."""
        self.state = "paused"
        await self._polling.pass_gate()
        await self._parts.calls.acquire_ack_permit()
        item = None
        try:
            item = await self._poll()
        finally:
            if item is None:
                self._parts.calls.release_ack_permit()
        return item

    async def _poll(self) -> WorkItem | None:
        self.state = "polling"
        started = self._polled_at = asyncio.get_running_loop().time()
        self._polling.sent()
        result: PollResult = "error"
        try:
            item = await self._parts.calls.poll(self._block_ms, self._reclaim_older_than_ms)
            result = "null" if item is None else "item"
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        except TransientError as error:
            if error.reason in {"throttled", "timeout"}:
                result = "throttled" if error.reason == "throttled" else "timeout"
            raise
        finally:
            self._polling.answered()
            seconds = asyncio.get_running_loop().time() - started
            self._parts.observe(PollFinished(result, seconds))
        self._backoff.reset()
        self._polling.succeeded(null=item is None)
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
        else:
            self._polling.note_refusal(failure)
        if failure.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._polling.scaling.throttled()
        if failure.status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            self._polling.close_gate(seconds)
        log.warning(
            "poll failed in_a_row=%d backoff=%.1fs error=%s",
            self._backoff.failures,
            seconds,
            failure,
        )
        self._parts.observe(PollerBackedOff(reason, seconds))
        await self._sleep(seconds)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.state = "backoff"
            await asyncio.sleep(seconds)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())
