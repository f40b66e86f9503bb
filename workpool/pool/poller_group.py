"""The pollers of one pool and their number: cooldown, refusals, and when the queue is empty.

On an empty queue one poll in flight is enough to receive the next item at once; each further poll
costs a request per `block_ms` and gains nothing. Poller *i* polls while *i* < `target`. A new pool
starts with all pollers, because the amount of work is not known.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING

from workpool.backoff import Backoff
from workpool.errors import RefusedError, TransientError
from workpool.events import PollersScaled

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import (
        ConflictError,
        ControlPlaneError,
        PreconditionError,
        UnreadableError,
        WorkpoolError,
    )
    from workpool.events import ScaleDirection, ScaleReason
    from workpool.pool.context import PoolContext

log = logging.getLogger(__name__)

REFUSED_SECONDS = 300.0
"""After a success, polls that are all refused are fatal once they have lasted this long."""
REMEMBERED_IDS = 1_000
"""The number of unreadable items that are remembered, to log each once."""
ACK_BACKOFF_SECONDS, ACK_BACKOFF_CAP_SECONDS = 1.0, 30.0
"""How long refused acks hold the pollers back."""
CONFLICT_BACKOFF_SECONDS, CONFLICT_BACKOFF_CAP_SECONDS = 0.05, 3.0
"""How long acks in conflict hold the pollers back, from the second in a row on."""


class PollerGroup:
    """The shared state of the pollers of one pool.

    Args:
        context: The pool's.
        until_empty: End at the first null poll while no item is ours and no poll is in flight.
        on_fatal: Called with an error that must end the pool.
        on_empty: Called when the queue is empty and `until_empty` is set.

    Attributes:
        ended: The queue was empty, so no poller polls again.
        target: The number of pollers that should be polling now, from 1 to the setting `pollers`.
        last_success_at: When a poll last succeeded, on the lease clock; None before that.
        on_poll: Called after each poll that succeeded, with whether it brought no item while no
            item is ours. None: nobody asks.
        refused: The last poll was refused.
        ack_refused: The last ack was refused.
    """

    def __init__(
        self,
        context: PoolContext,
        *,
        until_empty: bool,
        on_fatal: Callable[[WorkpoolError], None],
        on_empty: Callable[[], None],
    ) -> None:
        self.ended = False
        self.target = context.settings.pollers
        self.last_success_at: float | None = None
        self.refused = self.ack_refused = False
        self.fail = on_fatal
        self.on_poll: Callable[[bool], None] | None = None
        self._until_empty = until_empty
        self._on_empty = on_empty
        self._context = context
        self._turns = [asyncio.Event() for _ in range(self.target)]
        for turn in self._turns:
            turn.set()
        self._refused_since: float | None = None
        self._cooldown_until = 0.0  # on the loop's clock
        self._ack_backoff = Backoff(ACK_BACKOFF_SECONDS, ACK_BACKOFF_CAP_SECONDS)
        self._conflict_backoff = Backoff(CONFLICT_BACKOFF_SECONDS, CONFLICT_BACKOFF_CAP_SECONDS)
        self._in_flight = 0
        self._answered = asyncio.Event()
        self._idle = False
        self._unreadable: OrderedDict[str | None, None] = OrderedDict()  # ids that are logged

    # Who polls, and when.

    def has_turn(self, number: int) -> bool:
        """Whether poller `number`, from 0, is among those that poll."""
        return number < self.target

    async def turn(self, number: int) -> None:
        """Wait until poller `number` is among those that poll."""
        await self._turns[number].wait()

    async def cooldown(self) -> None:
        """Wait while all pollers are held back."""
        while self._cooldown_until:
            seconds = self._cooldown_until - asyncio.get_running_loop().time()
            if seconds <= 0:
                self._cooldown_until = 0.0
            else:
                await asyncio.sleep(seconds)  # it may be extended meanwhile

    def hold_back(self, seconds: float) -> None:
        """Hold all pollers back for `seconds` from now."""
        until = asyncio.get_running_loop().time() + seconds
        self._cooldown_until = max(self._cooldown_until, until)

    # The results of polls and acks.

    def sent(self) -> None:
        """Record that a poll is in flight."""
        self._in_flight += 1

    def answered(self) -> None:
        """Record that a poll is no longer in flight."""
        self._in_flight -= 1
        if self._until_empty:
            self._answered.set()
            self._answered = asyncio.Event()

    def succeeded(self, *, null: bool) -> None:
        """Record a poll that succeeded; `null`: without an item."""
        self.last_success_at = self._context.clock()
        self.refused = False
        self._refused_since = None
        if null:
            self._scale(self.target - 1, "nulls")
        else:
            self._scale(self.target + 1, "hits")
        idle = null and self._context.queue.idle
        if idle and not self._idle:  # once when idleness starts, not once per poll
            log.info("idle; waiting for work")
        self._idle = idle
        if self.on_poll is not None:
            self.on_poll(idle)

    def skipped(self, error: UnreadableError) -> None:
        """Record a poll that brought an item that cannot be read; log each item once."""
        self.refused = False
        self._refused_since = None
        self._scale(self.target + 1, "hits")
        if error.work_id in self._unreadable:
            return
        self._unreadable[error.work_id] = None
        if len(self._unreadable) > REMEMBERED_IDS:
            self._unreadable.popitem(last=False)
        shown = error.work_id or "unknown"
        log.warning("item cannot be read, left for others work_id=%s error=%s", shown, error)

    def failed(self, error: ControlPlaneError) -> None:
        """Record a poll that failed.

        A refusal is fatal before the first success, and after `REFUSED_SECONDS` of nothing else.
        """
        self.refused = not isinstance(error, TransientError)
        if not self.refused:
            self._refused_since = None
            return
        now = self._context.clock()
        if self._refused_since is None:
            self._refused_since = now
        if self.last_success_at is None or now - self._refused_since >= REFUSED_SECONDS:
            self.fail(error)

    def throttled(self) -> None:
        """Halve the number of pollers after a 429."""
        self._scale(self.target // 2, "throttled")

    def note_ack(self, error: RefusedError | ConflictError | PreconditionError | None) -> None:
        """Record the error of an ack, which may hold the pollers back, or None for a success."""
        if error is None:
            self.ack_refused = False
            self._ack_backoff.reset()
            self._conflict_backoff.reset()
        elif isinstance(error, RefusedError):
            self.ack_refused = True
            self.hold_back(self._ack_backoff.next())
        else:
            # Two workers whose polls and acks are in step could otherwise take an item from each
            # other without end: each polls it before the other one's ack arrives.
            seconds = self._conflict_backoff.next()
            if self._conflict_backoff.failures > 1:
                self.hold_back(seconds)

    async def settle_empty(self) -> None:
        """After a null poll, end if the queue is certainly empty, else wait for another poll."""
        if not (self._until_empty and self._context.queue.idle):
            return
        if self._in_flight == 0:
            self.ended = True
            self._on_empty()
        else:
            await self._answered.wait()  # bounded, as every poll is

    def _scale(self, wanted: int, reason: ScaleReason) -> None:
        target = max(1, min(wanted, len(self._turns)))
        if target == self.target:
            return
        direction: ScaleDirection = "up" if target > self.target else "down"
        self.target = target
        for number, turn in enumerate(self._turns):
            if number < target:
                turn.set()
            else:
                turn.clear()
        self._context.observe(PollersScaled, direction, reason, target)
