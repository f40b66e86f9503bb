"""Sends a pool's requests for an item: heartbeats, stops, and writes of metadata and events.

The lease is checked as the last step before the bytes are written: after the waits for the rate
limit, a connection and DNS, with no await in between. Bytes that the kernel has accepted cannot be
taken back if the lease ends after that. `ItemSender` makes and repeats the calls whose requests
have no precondition; `HeartbeatSender` sends one heartbeat, and reads the item if the answer leaves
open which worker holds it. See workpool/docs/architecture.md, "Sending for an item" and "The
arithmetic of a lease". An `ItemSender` is used on the handlers' loop; each event loop has a
`HeartbeatSender` of its own.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from workpool.backoff import Backoff
from workpool.errors import (
    ConflictError,
    LeaseLost,
    NotPermittedError,
    PreconditionError,
    RefusedError,
    SessionEnded,
    SessionGoneError,
    TransientError,
)
from workpool.events import HeartbeatFinished
from workpool.log_fields import pool_logger
from workpool.pool.call_permissions import OptionalCalls, read_or_find_item
from workpool.pool.machine_pauses import PAUSE_SECONDS
from workpool.wire.http.call_options import CallOptions, Priority
from workpool.wire.http.timeouts import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.errors import ControlPlaneError
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.lease import HeartbeatAttempt, HeartbeatDecision, Lease
    from workpool.pool.machine_pauses import Clock, MachinePauseDetector
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.telemetry import EventReporter
    from workpool.wire.items import Heartbeat, WorkItem

    Call = Callable[[CallOptions, float], Awaitable["T"]]
    LeaseCheck = Callable[[Lease, float], None]

log = pool_logger(__name__)
T = TypeVar("T")


class LeaseUnverified(TransientError):
    """A write was not sent, because the machine was paused and the lease may have ended meanwhile.

    Once a heartbeat has succeeded, the write may be retried.
    """

    def __init__(self) -> None:
        problem = "the machine was paused; the lease is verified first"
        super().__init__("lease", None, problem, reason="not_sent")


RETRY_SECONDS, RETRY_CAP_SECONDS = 0.2, 3.0
TRY_PART = 3
"""A try takes at most the time that is left divided by this, so that others can follow."""
CALLS_PER_SESSION = 8
"""Largest number of concurrent calls of one session; further ones wait."""


def make_request_backoff() -> Backoff:
    """Create the delays between the tries of one request for an item."""
    return Backoff(RETRY_SECONDS, RETRY_CAP_SECONDS)


class SendOptions(NamedTuple):
    """The priority and the limits of a call for an item.

    Attributes:
        priority: The priority among the calls that wait for the rate limit or a connection.
        by_handler: Whether the handler makes the call; such a call is refused unless the handler
            runs.
        seconds: The seconds for which the call is retried; infinite = as long as the lease is held.
    """

    priority: Priority
    by_handler: bool
    seconds: float = math.inf


class ItemSender:
    """Sends the requests for the items of one pool, and checks the lease before each.

    Args:
        client: The client of the handlers' loop.
        clock: The lease clock.
        request_timeout: The longest time for one try, in seconds.
        pauses: Detects that the machine was paused.
        on_pause: Called when a pause is noticed: the leases must be verified by heartbeats.
    """

    def __init__(
        self,
        client: ClientProtocol,
        clock: Clock,
        request_timeout: float,
        pauses: MachinePauseDetector,
        on_pause: Callable[[], None],
    ) -> None:
        self._client = client
        self._clock = clock
        self._request_timeout = request_timeout
        self._pauses = pauses
        self._on_pause = on_pause

    def check_requests_allowed(
        self, item: PoolItem, *, by_handler: bool, now: float | None = None
    ) -> None:
        """Raise an error if no request may be sent for the item now.

        `now` is the time if the caller has just read the clock.

        Raises:
            LeaseLost: The lease is not held, or a child process may hold it.
            SessionEnded: The session has ended, or its handler does not run.
        """
        lease = item.lease
        lease.check_held(self._clock() if now is None else now)
        if item.handoff is not None and item.handoff.state != "closed":
            raise LeaseLost(item.id)
        if by_handler and (item.cancelled_for is not None or not item.is_handler_running):
            raise SessionEnded(item.id)

    def check_writes_allowed(
        self,
        item: PoolItem,
        *,
        by_handler: bool,
        before_bytes: Callable[[], None] | None = None,
    ) -> None:
        """Raise an error if no write may be sent for the item now.

        `before_bytes` is called if the write may be sent.

        Raises:
            SessionGoneError: From `check_requests_allowed`.
            LeaseUnverified: The machine was paused, and the lease is not verified yet.
        """
        lease, now = item.lease, self._clock()
        unseen = self._pauses.seconds_missed_by_lease_clock(lease.clock_offset, now)
        paused = abs(unseen) >= PAUSE_SECONDS
        # Even a pause shorter than `PAUSE_SECONDS` is subtracted from the lease: the lease may have
        # ended in it, and another worker may have the item.
        held_at = now if paused else now + max(0.0, unseen)
        self.check_requests_allowed(item, by_handler=by_handler, now=held_at)
        if not lease.begun and (lease.unsettled or paused):
            # Without a successful heartbeat, the item may belong to another worker.
            raise LeaseLost(item.id)
        if paused:
            self._on_pause()
            raise LeaseUnverified
        if before_bytes is not None:
            before_bytes()

    async def send_with_retries(
        self,
        item: PoolItem,
        call: Call[T],
        options: SendOptions,
        before_bytes: Callable[[], None] | None = None,
    ) -> T:
        """Make a call that needs the lease, and retry it after transient errors.

        The retries end with the lease, or after `options.seconds`. `before_bytes` is called after
        the check of the lease, right before the first byte is written.

        Raises:
            SessionGoneError: The check, right before the bytes of every try, failed.
            ControlPlaneError: The call was refused, in conflict, or still failed at the end.
        """
        backoff: Backoff | None = None
        until = math.inf
        if options.seconds != math.inf:
            until = asyncio.get_running_loop().time() + options.seconds
        check = partial(
            self.check_writes_allowed,
            item,
            by_handler=options.by_handler,
            before_bytes=before_bytes,
        )
        call_options = CallOptions(check, options.priority, permit=True)
        while True:
            try:
                return await self._try_request_once(item, call, options, until, call_options)
            except TransientError as error:
                failure = error
            backoff = backoff or make_request_backoff()
            call_options = call_options._replace(
                new_connection=failure.reason in {"timeout", "network"}
            )
            left = self._seconds_left_to_send(item, until, self._clock())
            # Wait for at most half of the remaining time, even if the Retry-After is longer: time
            # must be left for another try. If the stop of an ended session were never sent, another
            # worker would run the item again.
            delay = max(backoff.next_delay(), min(failure.retry_after or 0.0, left / 2))
            if delay >= left:
                self.check_requests_allowed(item, by_handler=options.by_handler)
                raise failure
            await item.wait_until(partial(self._should_end_retry_wait, item.lease, failure), delay)

    async def await_call_while_leased(
        self, item: PoolItem, call: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Await `call()` until the lease's deadline; call again if the lease was renewed by then.

        Each try ends at the deadline that the lease had when the try began.

        Raises:
            SessionGoneError: The handler may not use the item anymore.
            TimeoutError: The limit of `seconds` was reached.
        """
        loop = asyncio.get_running_loop()
        until = math.inf if seconds is None else loop.time() + seconds
        while True:
            now = self._clock()
            self.check_requests_allowed(item, by_handler=True, now=now)
            try:
                with TimeLimit(
                    self._seconds_left_to_send(item, until, now), open_limits=item.open_sends
                ):
                    return await call()
            except TimeoutError:
                self.check_requests_allowed(item, by_handler=True)
                if loop.time() >= until:
                    raise

    def abort_waits_for_answers(self, item: PoolItem) -> None:
        """End every wait for an answer to a request for the item; each wait raises TimeoutError."""
        for limit in list(item.open_sends):
            limit.expire_now()

    async def _try_request_once(
        self,
        item: PoolItem,
        call: Call[T],
        options: SendOptions,
        until: float,
        call_options: CallOptions,
    ) -> T:
        now = self._clock()
        self.check_requests_allowed(item, by_handler=options.by_handler, now=now)
        try:
            if not self._client.try_acquire_permit(options.priority):
                with TimeLimit(
                    self._seconds_left_to_send(item, until, now), open_limits=item.open_sends
                ):
                    await self._client.acquire_permit(options.priority)
                now = self._clock()
            seconds = min(
                self._request_timeout, self._seconds_left_to_send(item, until, now) / TRY_PART
            )
            with TimeLimit(None, open_limits=item.open_sends):
                return await call(call_options, seconds)
        except TimeoutError:
            self.check_requests_allowed(item, by_handler=options.by_handler)
            raise TransientError("call", None, "no answer in time", reason="timeout") from None

    def _should_end_retry_wait(self, lease: Lease, failure: TransientError) -> bool:
        """Return whether the wait before a retry may end early.

        The wait may end once a heartbeat has verified the lease after a pause, or once the lease
        has ended.
        """
        if isinstance(failure, LeaseUnverified) and not self._pauses.was_machine_paused(
            since=lease.clock_offset
        ):
            return True
        return lease.is_over

    def _seconds_left_to_send(self, item: PoolItem, until: float, now: float) -> float:
        left = item.lease.remaining_seconds(now)
        if until == math.inf:
            return left
        return min(until - asyncio.get_running_loop().time(), left)


ControlPlaneErrors = (TransientError, RefusedError, ConflictError, PreconditionError)


class HeartbeatSender:
    """Sends heartbeats through the client of one event loop."""

    def __init__(
        self,
        client: ClientProtocol,
        clock: Clock,
        pauses: MachinePauseDetector,
        observe: EventReporter,
        optional: OptionalCalls | None = None,
    ) -> None:
        self._optional = optional or OptionalCalls()
        self._client = client
        self._clock = clock
        self._pauses = pauses
        self._observe = observe

    async def send_heartbeat(self, lease: Lease, check: LeaseCheck | None = None) -> bool:
        """Send one heartbeat, apply the answer to the lease; return whether the lease was extended.

        `check` is called with the lease and the time right before the bytes; it may end the lease,
        so that nothing is sent.
        An unexpected error ends the lease, since no handler may continue with a lease that is not
        renewed.
        """
        try:
            return await self._send_and_apply_heartbeat(lease, check)
        except Exception:
            log.exception("heartbeat crashed", extra={"work_id": lease.item.id})
            lease.in_flight = False
            lease.end_lease("lost")
            return False

    async def _send_and_apply_heartbeat(self, lease: Lease, check: LeaseCheck | None) -> bool:
        now = self._clock()
        attempt = lease.begin_heartbeat(now, lease.due_at, self._pauses.wall_clock_offset(now))
        options = CallOptions(
            partial(self._check_lease_before_heartbeat, lease, check), Priority.COMPLETION
        )
        outcome: Heartbeat | ControlPlaneError
        try:
            try:
                outcome = await self._client.heartbeat(
                    lease.item.id,
                    attempt.expected,
                    attempt.ttl,
                    timeout=attempt.timeout,
                    options=options,
                )
            except SessionGoneError:
                # `_check_lease_before_heartbeat` raised the error right before the request, so
                # nothing was sent.
                lease.record_unsent_heartbeat(attempt)
                return False
            except ControlPlaneErrors as error:
                outcome = error
            decision = lease.apply_heartbeat_answer(self._clock(), attempt, outcome)
            if decision.then == "read":
                look_up = not isinstance(outcome, ConflictError)
                decision = await self._read_item(lease, attempt, decision, look_up=look_up)
        finally:
            if lease.in_flight:
                lease.record_unanswered_heartbeat()
        if decision.result is not None:
            self._observe(HeartbeatFinished, lease.item, decision.result, attempt.lag)
        return decision.then == "held"

    async def _read_item(
        self, lease: Lease, attempt: HeartbeatAttempt, decision: HeartbeatDecision, *, look_up: bool
    ) -> HeartbeatDecision:
        """Read the item to find out which worker has it; update the lease from the item's state.

        `look_up`: if the credential may not read one item, search the list for it. After a 409 the
        search is not worth its cost: the lease has ended in any case.
        """
        outcome: WorkItem | ControlPlaneError | None
        client, work_id, timeout = self._client, lease.item.id, attempt.timeout
        try:
            if look_up:
                outcome = await read_or_find_item(client, self._optional, work_id, timeout)
            else:
                outcome = await self._optional.send_optional_call(
                    "get", lambda: client.get(work_id, timeout=timeout)
                )
        except NotPermittedError:
            outcome = None
        except ControlPlaneErrors as error:
            outcome = error
        return lease.apply_item_read_outcome(self._clock(), decision.result, outcome)

    def _check_lease_before_heartbeat(self, lease: Lease, check: LeaseCheck | None) -> None:
        now = self._clock()
        if check is not None:
            check(lease, now)
        lease.check_held(now)
