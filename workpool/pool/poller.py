"""The pollers of one pool: the loop of each poller, and the number of pollers that poll now.

A poller acquires a place and an ack permit, polls, offers the item, and waits for a time that
depends on the answer. A poll only delivers an item, so after a cancelled poll the item is delivered
again. On an empty queue one poll in flight is enough to receive the next item at once; each further
poll costs a request per `block_ms` and gains nothing. Poller *i* polls while *i* < `target`. A new
pool starts with all pollers, because the amount of work is not known. See
workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
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
from workpool.events import PollerBackedOff, PollerRestarted, PollersScaled, PollFinished
from workpool.log_fields import pool_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import (
        ConflictError,
        PreconditionError,
        WorkpoolError,
    )
    from workpool.events import BackoffReason, PollResult, ScaleDirection, ScaleReason
    from workpool.pool.dispatcher import Dispatcher, OfferResult
    from workpool.pool.pool_context import PoolContext
    from workpool.wire.items import WorkItem

log = pool_logger(__name__)

PollerState = Literal["polling", "pacing", "backoff", "waiting_slot", "paused"]
"""`pacing`: waiting for the rest of `block_ms`, because the last poll started nothing."""

BACKOFF_SECONDS, BACKOFF_CAP_SECONDS = 0.5, 30.0
CRASHES = 5
SKIP_SECONDS = 0.02
"""Seconds between a poll that brought an unreadable item and the next one."""
SKIPS = 250
"""Number of unreadable items in a row that are skipped quickly.

One poller can skip this many before the control plane delivers the first of them again, after 5 s
by default.
"""
REFUSED_SECONDS = 300.0
"""After a poll has succeeded, only this many seconds of refused polls end the pool."""
REMEMBERED_IDS = 1_000
"""Number of unreadable items that are remembered, to log each once."""
ACK_BACKOFF_SECONDS, ACK_BACKOFF_CAP_SECONDS = 1.0, 30.0
"""Seconds for which a refused ack stops the pollers, at first and at most."""
CONFLICT_BACKOFF_SECONDS, CONFLICT_BACKOFF_CAP_SECONDS = 0.05, 3.0
"""Seconds for which acks in conflict stop the pollers, from the second in a row on."""


class PollerGroup:
    """The shared state of the pollers of one pool.

    Args:
        context: The context of the pool.
        until_empty: Whether to end at the first null poll while the pool owns no item and no poll
            is in flight.
        on_fatal: Called with an error that must end the pool.
        on_empty: Called when the queue is empty and `until_empty` is set.

    Attributes:
        ended: Whether the queue was empty, so that no poller polls again.
        target: The number of pollers that should poll now, from 1 to the setting `pollers`.
        last_success_at: The time of the last successful poll, on the lease clock; None before that.
        on_poll: Called after each successful poll with True if it brought no item and the pool owns
            none; None: no function.
        cooldown_until: The time at which the pollers may poll again, on the loop's clock; 0 if they
            may poll now.
        refused: Whether the last poll was refused.
        ack_refused: Whether the last ack was refused.
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
        self.cooldown_until = 0.0
        self._ack_backoff = Backoff(ACK_BACKOFF_SECONDS, ACK_BACKOFF_CAP_SECONDS)
        self._conflict_backoff = Backoff(CONFLICT_BACKOFF_SECONDS, CONFLICT_BACKOFF_CAP_SECONDS)
        self._in_flight = 0
        self._answered = asyncio.Event()
        self._idle = False
        # The ids of unreadable items that were logged, so that each is logged once.
        self._unreadable: OrderedDict[str | None, None] = OrderedDict()

    async def wait_until_poller_needed(self, number: int) -> None:
        """Wait until poller `number` should poll: until `target` is larger than `number`."""
        await self._turns[number].wait()

    async def wait_for_cooldown(self) -> None:
        """Wait until the cooldown, in which no poller of the group polls, is over."""
        while self.cooldown_until:
            seconds = self.cooldown_until - asyncio.get_running_loop().time()
            if seconds <= 0:
                self.cooldown_until = 0.0
            else:
                # Another poller may extend the cooldown during this wait, so check it again.
                await asyncio.sleep(seconds)

    def begin_cooldown(self, seconds: float) -> None:
        """Begin a cooldown: no poller of the group polls for `seconds` from now."""
        until = asyncio.get_running_loop().time() + seconds
        self.cooldown_until = max(self.cooldown_until, until)

    def record_poll_sent(self) -> None:
        """Record that a poll was sent, and is not answered yet."""
        self._in_flight += 1

    def record_poll_answered(self) -> None:
        """Record that a poll has ended, with an answer or an error."""
        self._in_flight -= 1
        if self._until_empty:
            self._answered.set()
            self._answered = asyncio.Event()

    def record_poll_success(self, at: float, *, null: bool) -> None:
        """Record a successful poll, and adjust the number of pollers.

        Args:
            at: The time of the answer, on the lease clock.
            null: Whether the answer had no item.
        """
        self.last_success_at = at
        self.refused = False
        self._refused_since = None
        if null:
            self._set_number_of_pollers(self.target - 1, "nulls")
        elif self.target < len(self._turns):
            self._set_number_of_pollers(self.target + 1, "hits")
        idle = null and self._context.queue.is_idle
        if idle and not self._idle:  # Log only when the pool becomes idle, not after each poll.
            log.info("idle; waiting for work")
        self._idle = idle
        if self.on_poll is not None:
            self.on_poll(idle)

    def record_unreadable_item(self, error: UnreadableError) -> None:
        """Record a poll that brought an item that cannot be read; log each item once."""
        self.refused = False
        self._refused_since = None
        self._set_number_of_pollers(self.target + 1, "hits")
        if error.work_id in self._unreadable:
            return
        self._unreadable[error.work_id] = None
        if len(self._unreadable) > REMEMBERED_IDS:
            self._unreadable.popitem(last=False)
        shown = error.work_id or "unknown"
        log.warning(
            "item cannot be read, left for others: %s",
            error,
            extra={"work_id": shown, "error": str(error)},
        )

    def record_poll_failure(self, error: ControlPlaneError) -> None:
        """Record a failed poll.

        A refusal is fatal before the first success, and after `REFUSED_SECONDS` with refusals only.
        Then no poller polls anymore.
        """
        self.refused = not isinstance(error, TransientError)
        if not self.refused:
            self._refused_since = None
            return
        now = self._context.clock()
        if self._refused_since is None:
            self._refused_since = now
        if self.last_success_at is None or now - self._refused_since >= REFUSED_SECONDS:
            self.ended = True
            self.fail(error)

    def halve_pollers(self) -> None:
        """Halve the number of pollers after a 429."""
        self._set_number_of_pollers(self.target // 2, "throttled")

    def record_ack_result(
        self, error: RefusedError | ConflictError | PreconditionError | None
    ) -> None:
        """Record the result of an ack: None for success, or an error that may begin a cooldown."""
        if error is None:
            self.ack_refused = False
            if self._ack_backoff.failures or self._conflict_backoff.failures:
                self._ack_backoff.reset()
                self._conflict_backoff.reset()
        elif isinstance(error, RefusedError):
            self.ack_refused = True
            self.begin_cooldown(self._ack_backoff.next_delay())
        else:
            # Without this cooldown, two workers could make each other's acks fail forever: whenever
            # one of them is about to send its ack, the control plane delivers the item to the other
            # one.
            seconds = self._conflict_backoff.next_delay()
            if self._conflict_backoff.failures > 1:
                self.begin_cooldown(seconds)

    async def end_if_queue_is_empty(self) -> None:
        """After a poll without an item, end a group that runs only until the queue is empty.

        If another poll is in flight, which may still return an item, only wait for its answer.
        """
        if not (self._until_empty and self._context.queue.is_idle):
            return
        if self._in_flight == 0:
            self.ended = True
            self._on_empty()
        else:
            # Every poll has a time limit, so the wait for the answers needs none.
            await self._answered.wait()

    def _set_number_of_pollers(self, wanted: int, reason: ScaleReason) -> None:
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


class Poller:
    """A loop that reserves a place, polls, and offers the received item to the dispatcher.

    Args:
        context: The context of the pool.
        group: The group of all pollers of the pool.
        dispatcher: The receiver of the items.
        number: The number in the group, from 0; poller 0 always polls.

    Attributes:
        state: The current activity, for the gauge.
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
        self._clock = context.clock
        self._polled_at = 0.0
        """The time at which the last poll was sent, on the lease clock."""
        self._backoff = Backoff(BACKOFF_SECONDS, BACKOFF_CAP_SECONDS)
        self._unreadable = 0
        """The number of polls in a row that brought an unreadable item."""

    async def run_polls(self) -> None:
        """Poll until the group ends; after `CRASHES` unexpected errors in a row, fail the pool."""
        crashes = 0
        while not self._group.ended:
            try:
                await self._poll_once()
                crashes = 0
            except (Exception, asyncio.CancelledError) as error:
                # A CancelledError without a cancellation of this task is a bug, so count a crash.
                if isinstance(error, asyncio.CancelledError) and _is_task_cancelled():
                    raise
                crashes += 1
                log.exception("poller crashed", extra={"in_a_row": crashes})
                self._context.observe(PollerRestarted, error)
                if crashes >= CRASHES:
                    fatal = PollerError(f"a poller crashed {crashes} times in a row")
                    fatal.__cause__ = error
                    self._group.fail(fatal)
                    return
                await self._set_state_and_sleep(self._backoff.next_delay())

    async def _poll_once(self) -> None:
        """Reserve a place in the queue, poll, and offer the item to the dispatcher.

        Then wait if the next poll must not follow at once.
        """
        if self._number >= self._group.target:
            self.state = "paused"
            # Do not reserve a place in the queue before this wait: during the wait, no other poller
            # could use that place.
            await self._group.wait_until_poller_needed(self._number)
        self.state = "waiting_slot"
        await self._context.queue.reserve_place()
        try:
            item, result = await self._poll_and_offer_item()
        except UnreadableError as error:
            await self._skip_unreadable_item(error)
            return
        except ControlPlaneError as error:
            await self._back_off_after_error(error)
            return
        if item is None:
            # End the poller group before the pause below, if it must end: during the pause, other
            # pollers may send polls, and the group could end only after their answers.
            await self._group.end_if_queue_is_empty()
        if result == "not_taken" or self._dispatcher.must_pause_between_polls:
            # Without this pause, the loop would be busy if the control plane answers at once with
            # null, or with items that are declined or cannot be claimed.
            await self._set_state_and_sleep(self._seconds_left_of_long_poll(), "pacing")
        elif result == "aside" and self._context.queue.too_many_items_set_aside:
            self.state = "pacing"
            await self._context.queue.wait_while_too_many_items_set_aside(
                self._seconds_left_of_long_poll()
            )

    async def _poll_and_offer_item(self) -> tuple[WorkItem | None, OfferResult]:
        """Poll as soon as cooldown and rate limit allow, and offer the item.

        Returns: The item, and the result of the offer.
        """
        item, permitted = None, False
        result: OfferResult = "not_taken"
        try:
            self.state = "paused"
            await self._acquire_ack_permit_when_polling_is_allowed()
            permitted = True
            item = await self._send_poll()
            if item is not None:
                result = self._dispatcher.offer_item(item, self._polled_at)
        finally:
            if result != "queued":
                self._context.queue.release_reserved_place()
            if permitted and result == "not_taken":
                self._context.client.release_ack_permit()
        return item, result

    async def _acquire_ack_permit_when_polling_is_allowed(self) -> None:
        while True:
            if self._group.cooldown_until:
                await self._group.wait_for_cooldown()
            if self._dispatcher.health.failures:
                await self._dispatcher.health.wait_until_a_handler_may_claim()
            if self._admission.gated:
                await self._admission.wait_until_claiming_is_allowed()
            await self._context.client.acquire_ack_permit()
            if not self._group.cooldown_until:
                return
            # Another poller has begun a cooldown during these waits. All conditions may change
            # until its end, so check each again, and hold no permit meanwhile.
            self._context.client.release_ack_permit()

    async def _send_poll(self) -> WorkItem | None:
        self.state = "polling"
        started = self._polled_at = self._clock()
        self._group.record_poll_sent()
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
            self._group.record_poll_answered()
            ended = self._clock()
            self._context.observe(PollFinished, result, ended - started)
        if self._backoff.failures:
            self._backoff.reset()
        self._unreadable = 0
        self._group.record_poll_success(ended, null=item is None)
        return item

    async def _back_off_after_error(self, failure: ControlPlaneError) -> None:
        reason, seconds = _wait_after_error(failure, self._backoff.next_delay())
        self._group.record_poll_failure(failure)
        if self._group.ended:
            return  # Do not log the error: the supervisor logs it, and ends the pool with it.
        if isinstance(failure, RefusedError):
            self._context.optional.forget_refusals()
        if failure.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._group.halve_pollers()
        if failure.status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            self._group.begin_cooldown(seconds)
        log.warning(
            "poll failed: %s",
            failure,
            extra={
                "in_a_row": self._backoff.failures,
                "wait_seconds": round(seconds, 3),
                "error": str(failure),
            },
        )
        self._context.observe(PollerBackedOff, reason, seconds)
        await self._set_state_and_sleep(seconds)

    async def _skip_unreadable_item(self, failure: UnreadableError) -> None:
        """Leave an unreadable item of a poll to other workers, and wait briefly.

        The item is delivered repeatedly. With a backoff each time, a few such items would stop the
        pool, so the next poll, which brings another item, follows at once. A control plane that
        delivers only such items is polled once per `block_ms`.
        """
        self._backoff.reset()
        self._unreadable += 1
        self._group.record_unreadable_item(failure)
        rest = self._seconds_left_of_long_poll()
        seconds = min(SKIP_SECONDS, rest) if self._unreadable <= SKIPS else rest
        await self._set_state_and_sleep(seconds, "pacing")

    def _seconds_left_of_long_poll(self) -> float:
        """Return the seconds that are left of `block_ms` since the start of the last poll.

        The result is negative if the poll took longer.
        """
        return self._polled_at + self._block_ms / 1000 - self._clock()

    async def _set_state_and_sleep(self, seconds: float, state: PollerState = "backoff") -> None:
        if seconds > 0:
            self.state = state
            await asyncio.sleep(seconds)


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())


def _wait_after_error(failure: ControlPlaneError, seconds: float) -> tuple[BackoffReason, float]:
    """Return the reason and the length of the wait after a failed poll.

    The length is `seconds`, or the Retry-After of the answer if that is longer.
    """
    if not isinstance(failure, TransientError):
        return "server_error", seconds
    if failure.retry_after is not None and failure.retry_after > seconds:
        return "retry_after", failure.retry_after
    if failure.reason == "throttled":
        return "throttled", seconds
    return "network" if failure.reason in {"network", "timeout"} else "server_error", seconds
