"""The deadlines and the status of one item's lease.

`Lease` reads no clock and awaits nothing: each method gets the time. One thread writes a lease at
a time: the handlers' loop until the first heartbeat has succeeded, the lease renewer from then on.
Any thread may read `status`, `deadline` and the flags. Deadlines are times on the lease clock of
`machine_pauses.py`. See workpool/docs/architecture.md, "The arithmetic of a lease".
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from workpool.errors import (
    ControlPlaneError,
    LeaseLost,
    SessionEnded,
    TransientError,
)
from workpool.pool.heartbeat_errors import (
    LeaseErrorConsequence,
    classify_heartbeat_error,
    classify_item_read_error,
)
from workpool.pool.machine_pauses import PAUSE_SECONDS
from workpool.settings import lease_margin
from workpool.wire.items import Heartbeat
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    ACTIVE,
    NO_HEARTBEAT,
    QUEUED,
    STARTING,
    STOPPED,
    STOPPING,
    TTL_MAX_SECONDS,
    TTL_MIN_SECONDS,
)

if TYPE_CHECKING:
    from workpool.events import HeartbeatResult, LossReason
    from workpool.wire.items import WorkItem

RENEW_PART, JITTER = 3, 0.1
"""The parts that set the time of a renewal: a third of the TTL, less up to a tenth of that.

So leases that were acquired together spread out.
"""
RETRY_PARTS: Final = (60, 30, 15)
"""A failed heartbeat is repeated after the TTL divided by these in turn; the last one repeats."""
ACK_MARGIN: Final = lease_margin(ACK_LEASE_SECONDS)
"""The margin of the lease that begins with an ack, in seconds."""
TIMEOUT_PART = 6
"""A heartbeat waits for its answer for at most the TTL divided by this."""

LeaseStatus = Literal["held", "finished", "released", "stopped", "lost", "handed_off"]
"""`held`, or how it ended.

`finished`: the pool's stop was applied. `released`: no heartbeat follows, so it lapses. `stopped`:
another client stopped the item. `lost`: another worker may have the item. `handed_off`: a child
process has the item.
"""


class HeartbeatAttempt(NamedTuple):
    """One heartbeat that is being sent.

    Attributes:
        at: The time of the decision to send the heartbeat, on the lease clock; the new deadline
            counts from this time.
        expected: The value of `expected_last_heartbeat`.
        ttl: The requested TTL in seconds.
        timeout: The limit of the wait for the answer, in seconds.
        deadline: The lease's deadline at the time of the decision.
        lag: The delay of the decision, in seconds.
        clock_offset: Seconds by which the wall clock was ahead of the lease clock at that time.
        last: Whether no other heartbeat follows, so that the lease lapses.
    """

    at: float
    expected: str
    ttl: int
    timeout: float
    deadline: float
    lag: float
    clock_offset: float
    last: bool


class HeartbeatDecision(NamedTuple):
    """The next step after the answer to a heartbeat, or to a read of the item.

    Attributes:
        then: `held`: the lease goes on. `again`: send another heartbeat at `Lease.due_at`.
            `read`: read the item to find out which worker has it. `over`: the lease has ended.
        result: The heartbeat's result for the metrics; None = it is not counted. If `then` is
            `read`: the result to count if the read shows that another worker has the item.
    """

    then: Literal["held", "again", "read", "over"]
    result: HeartbeatResult | None


IGNORED: Final = HeartbeatDecision("over", None)
EXTENDED: Final = HeartbeatDecision("held", "ok")


class Lease:
    """The lease of one acknowledged item.

    Attributes:
        item: The item in the answer to the acknowledgement.
        deadline: The time until which no other worker can get the item, on the lease clock.
        due_at: The time of the next heartbeat; infinite if none follows.
        give_up_at: Latest time for a successful heartbeat; after it the lease is considered lost.
        ttl: The TTL in seconds that the answer to the last successful heartbeat granted.
        expected: The `expected_last_heartbeat` of the next heartbeat.
        status: Whether the lease is held, or how it ended.
        loss: How the lease was lost, if its status is `lost`.
        begun: Whether a heartbeat has succeeded.
        stop_requested: Whether a heartbeat's answer had a stop request.
        unsettled: Whether it is unknown that the lease is ours: the answer to the ack was `active`,
            as it would be for an item of another worker, and no heartbeat has succeeded yet. Only
            heartbeats may be sent.
        in_flight: Whether a heartbeat is being sent.
        clock_offset: Seconds by which the wall clock was ahead of the lease clock when the claim
            began or the last successful heartbeat was sent. If the offset has changed since then,
            the machine was paused, and only heartbeats may be sent.
        own_stop: Whether a stop of this pool may have been applied. Written on the handlers' loop
            only.
        closed: Whether the session has ended, so that nothing may be sent. Written on the handlers'
            loop only.
    """

    __slots__ = (
        "_failures", "_in_handoff", "_margin", "_read_twice", "_release_ttl",
        "_request_timeout", "_ttl_asked", "_unanswered", "_verification_requested", "begun",
        "clock_offset", "closed", "deadline", "due_at", "expected", "give_up_at",
        "in_flight", "item", "loss", "own_stop", "status", "stop_requested", "ttl",
        "unsettled",
    )  # fmt: skip

    def __init__(
        self,
        item: WorkItem,
        acked_at: float,
        *,
        ttl: int,
        request_timeout: float,
        polled_at: float | None = None,
        parents_heartbeat: str | None = None,
    ) -> None:
        """Create the lease of an item that was just acknowledged, or handed off to this process.

        Args:
            item: The item in the answer to the acknowledgement.
            acked_at: The time at which the first ack that may have been applied was sent, on the
                lease clock.
            ttl: The TTL in seconds that heartbeats request.
            request_timeout: The longest time to wait for an answer, in seconds.
            polled_at: The time at which the poll that delivered the item was sent, on the lease
                clock. An ack that answers `active` may belong to a lease that began with that poll,
                so the first deadline counts from it. None = `acked_at`.
            parents_heartbeat: The value that the first heartbeat must expect if a parent handed the
                item off.
        """
        self.item = item
        self.ttl, self._margin = float(ACK_LEASE_SECONDS), ACK_MARGIN
        self.unsettled = item.state == ACTIVE and parents_heartbeat is None
        began_at = polled_at if self.unsettled and polled_at is not None else acked_at
        self._set_deadline(began_at + ACK_LEASE_SECONDS, self.ttl)
        self.due_at = acked_at
        self.clock_offset = 0.0
        self.expected = parents_heartbeat or NO_HEARTBEAT
        self.status: LeaseStatus = "held"
        self.loss: LossReason = "expired"
        self.begun = self.stop_requested = False
        self.in_flight = self.own_stop = self.closed = False
        self._verification_requested = False
        self._ttl_asked = ttl
        self._request_timeout = request_timeout
        self._release_ttl: int | None = None
        self._in_handoff = parents_heartbeat is not None
        self._unanswered = self._read_twice = False
        self._failures = 0

    # The following methods may be called on any thread.

    def is_held(self, now: float) -> bool:
        """Return whether this pool has the lease at the time `now`."""
        return self.status == "held" and now < self.deadline and not self.closed

    def remaining_seconds(self, now: float) -> float:
        """Return the seconds until the deadline; 0 if the lease is not held."""
        return 0.0 if self.closed or self.status != "held" else max(0.0, self.deadline - now)

    @property
    def is_over(self) -> bool:
        """Whether no further heartbeat is sent, because the lease or the session has ended."""
        return self.closed or self.status != "held"

    @property
    def is_loss_confirmed(self) -> bool:
        """Whether an answer of the control plane shows that this pool no longer has the item.

        A lease is also lost without such an answer if no heartbeat succeeds in time.
        """
        return self.status == "lost" and self.loss in {"taken", "gone"}

    @property
    def is_releasing(self) -> bool:
        """Whether the pool releases the item: the pool sends one last heartbeat, and then none."""
        return self._release_ttl is not None

    @property
    def is_freshly_extended(self) -> bool:
        """Whether the latest heartbeat has extended the lease, and no heartbeat is in flight."""
        failing = self._unanswered or self._read_twice or self._failures > 0
        return self.begun and not (self.in_flight or failing)

    def check_held(self, now: float) -> None:
        """Raise an error if the lease does not allow a request for the item at the time `now`.

        Raises:
            SessionEnded: The session has ended, or the item was stopped or handed off.
            LeaseLost: The lease is not held.
        """
        # The condition of `is_held` is inlined, because a call for every write costs too much.
        if self.status != "held" or now >= self.deadline or self.closed:
            ended = self.closed or self.status in {"stopped", "handed_off"}
            raise (SessionEnded if ended else LeaseLost)(self.item.id)

    def record_own_stop(self) -> None:
        """Record that this pool sends a stop; the control plane may apply it from now on.

        Called on the handlers' loop only.
        """
        self.own_stop = True

    # Only one thread at a time calls the following methods: the thread of the handlers' loop until
    # the lease has begun, and the lease renewer's thread after that.

    def end_lease(self, status: LeaseStatus, loss: LossReason = "expired") -> None:
        """End a held lease; a lease that has ended does not change."""
        if self.status == "held":
            self.loss = loss
            self.due_at = math.inf
            self.status = status

    def end_if_expired(self, now: float) -> bool:
        """End the lease if its give-up time has passed; return whether the lease is over."""
        if self.status == "held" and now >= self.give_up_at:
            self.end_lease("lost")
        return self.is_over

    def make_heartbeat_due(self, now: float) -> None:
        """Make the next heartbeat due now, because another worker may have the item."""
        if self.due_at != math.inf:
            self.due_at = min(self.due_at, now)

    def request_verification_after_pause(self, now: float) -> bool:
        """Make the next heartbeat due now, because the lease may have ended in a pause.

        Only the first call after a successful heartbeat has an effect, and returns True.
        """
        first, self._verification_requested = not self._verification_requested, True
        if first:
            self.make_heartbeat_due(now)
        return first

    def schedule_last_heartbeat(self, now: float, delay: float) -> None:
        """Make one last heartbeat due now, which releases the item.

        The heartbeat requests a TTL of `delay` seconds. The lease ends after this time, and then
        another worker may get the item.
        """
        self._release_ttl = round(min(max(delay, TTL_MIN_SECONDS), TTL_MAX_SECONDS))
        self.due_at = now

    def suspend_heartbeats(self) -> None:
        """Send no heartbeat until `resume_heartbeats`, because a child process may send its own."""
        self._in_handoff = True
        self.due_at = math.inf

    def resume_heartbeats(self, now: float) -> None:
        """Send heartbeats again, the first one now."""
        self.due_at = now

    def begin_heartbeat(
        self, now: float, planned_at: float, clock_offset: float = 0.0
    ) -> HeartbeatAttempt:
        """Record that a heartbeat is being sent, and return its parameters.

        The caller must then call `apply_heartbeat_answer`, `record_unsent_heartbeat` or
        `record_unanswered_heartbeat`. `clock_offset` is the number of seconds by which the wall
        clock is ahead of the lease clock.
        """
        self.in_flight = True
        last = self._release_ttl is not None
        ttl = self._release_ttl or self._ttl_asked
        lag = max(0.0, now - planned_at)
        before = self.deadline
        # Shorten the deadline before the answer: the heartbeat may shorten the lease to the
        # requested TTL, and its answer may be lost.
        self._set_deadline(min(before, now + ttl), min(self.ttl, ttl))
        # Wait for the answer for only a part of the TTL, so that time is left for another try.
        left = self.give_up_at - now
        timeout = max(0.001, min(self._request_timeout, self.ttl / TIMEOUT_PART, left))
        return HeartbeatAttempt(now, self.expected, ttl, timeout, before, lag, clock_offset, last)

    def record_unsent_heartbeat(self, attempt: HeartbeatAttempt) -> None:
        """Record that the heartbeat was not sent."""
        self.in_flight = False
        self._set_deadline(attempt.deadline, self.ttl)

    def record_unanswered_heartbeat(self) -> None:
        """Record that no answer to the heartbeat came; the control plane may have applied it."""
        self.in_flight = False
        self._unanswered = True

    def apply_heartbeat_answer(
        self, now: float, attempt: HeartbeatAttempt, outcome: Heartbeat | ControlPlaneError
    ) -> HeartbeatDecision:
        """Update the lease from the answer to a heartbeat."""
        if self.status != "held":
            decision = IGNORED  # The lease has ended while the heartbeat was in flight.
        elif isinstance(outcome, Heartbeat):
            decision = self._apply_heartbeat_success(now, attempt, outcome)
        else:
            decision = self._apply_heartbeat_error(now, attempt, outcome)
        self.in_flight = decision.then == "read"
        return decision

    def apply_item_read_outcome(
        self,
        now: float,
        result_if_taken: HeartbeatResult | None,
        outcome: WorkItem | ControlPlaneError | None,
    ) -> HeartbeatDecision:
        """Update the lease from a read of the item, which shows whether this pool still has it.

        Args:
            now: The time of the answer.
            result_if_taken: The heartbeat's result for the metrics if another worker has the item.
            outcome: The item, or the error of the read; None: it was not found, or the credential
                may not read it.
        """
        self.in_flight = False
        if self.status != "held":
            return IGNORED
        if outcome is None:
            self.end_lease("finished" if self.own_stop else "lost")
            return HeartbeatDecision("over", result_if_taken)
        if isinstance(outcome, ControlPlaneError):
            # The failed read did not show which worker has the item. With this flag, a 412 to the
            # next heartbeat leads to another read, and not to the loss of the lease.
            self._unanswered = True
            return self._retry_or_end_lease(now, classify_item_read_error(outcome), outcome)
        status = self.find_status_in_read_item(outcome)
        if status != "held":
            self.end_lease(status, "taken")
            return HeartbeatDecision("over", result_if_taken)
        self._unanswered = False
        self.expected = _find_last_heartbeat(outcome)
        if self._read_twice:
            # For the second time, the item that was read contradicts the answer to the heartbeat
            # before the read. Wait before the next heartbeat: otherwise the heartbeats and reads
            # would be a busy loop.
            self._schedule_heartbeat_retry(now)
        else:
            self._read_twice = True
            self.due_at = now
        return HeartbeatDecision("again", "recovered")

    def find_status_in_read_item(self, item: WorkItem) -> LeaseStatus:
        """Return the status of the lease, as the item that was just read shows it.

        As long as `acknowledged_at` is that of this pool's ack, no other worker has acknowledged
        it. During a handoff parent and child expect the same heartbeat; a later heartbeat is the
        child's, or one of this pool that was not answered. It is taken for the child's: two
        processes that run one item are worse than none.
        """
        if item.state == STARTING and (self._in_handoff or self.item.state == ACTIVE):
            # The item was `active` and is `starting` again, so a poll or an ack of another worker
            # has begun a new lease.
            return "lost"
        acked_at = self.item.acknowledged_at
        ours = acked_at is not None and item.acknowledged_at == acked_at
        if self._in_handoff and ours and item.last_heartbeat != self.expected:
            return "handed_off"
        if item.state == STOPPED:
            return "finished" if self.own_stop else "stopped"
        return "held" if ours and item.state != QUEUED else "lost"

    def _apply_heartbeat_success(
        self, now: float, attempt: HeartbeatAttempt, heartbeat: Heartbeat
    ) -> HeartbeatDecision:
        if now >= attempt.deadline:
            # The answer came after the old deadline. Another worker may have run the item since
            # then, so the new lease must not be used.
            self.end_lease("lost")
            return HeartbeatDecision("over", "timeout")
        if heartbeat.state == STOPPED:  # No worker can run a stopped item anymore.
            self.end_lease("finished" if self.own_stop else "stopped")
            return HeartbeatDecision("over", "ok")
        extended, stopping = heartbeat.lease_extended, heartbeat.state == STOPPING
        if not heartbeat.last_heartbeat or (self.unsettled and (stopping or not extended)):
            # Some control planes accept a heartbeat for a `stopping` item from any worker. Such an
            # answer proves neither that this pool has the item nor that the lease is lost.
            proven = not stopping or not heartbeat.last_heartbeat
            self.end_lease("lost", "taken" if proven else "expired")
            return HeartbeatDecision("over", "conflict")
        paused = abs(attempt.clock_offset - self.clock_offset) >= PAUSE_SECONDS
        if stopping and paused:
            # The answer `stopping` is given to any worker, so it does not prove that the lease was
            # still held after the pause.
            self.end_lease("lost")
            return HeartbeatDecision("over", "conflict")
        if not extended and not stopping:
            self._unanswered, self.expected = False, heartbeat.last_heartbeat
            return HeartbeatDecision("read", "conflict")
        self._apply_extension(attempt, heartbeat)
        self.begun = True
        self.stop_requested |= heartbeat.state == STOPPING and not self.own_stop
        if attempt.last:
            self.end_lease("released")
        return HeartbeatDecision("over", "ok") if attempt.last else EXTENDED

    def _apply_extension(self, attempt: HeartbeatAttempt, heartbeat: Heartbeat) -> None:
        self.expected, self.clock_offset = heartbeat.last_heartbeat, attempt.clock_offset
        self._unanswered = self._in_handoff = self._read_twice = self.unsettled = False
        self._verification_requested = False
        self._failures = 0
        if heartbeat.lease_extended:
            ttl = heartbeat.ttl_seconds
            self._set_deadline(attempt.at + ttl, ttl)
        if self._release_ttl is not None and not attempt.last:
            # While this heartbeat was in flight, `schedule_last_heartbeat` has set `due_at`: keep
            # that value.
            return
        jitter = 1 - JITTER * random.random()  # noqa: S311 - spreads load, guards nothing
        self.due_at = attempt.at + self.ttl / RENEW_PART * jitter

    def _apply_heartbeat_error(
        self, now: float, attempt: HeartbeatAttempt, error: ControlPlaneError
    ) -> HeartbeatDecision:
        if isinstance(error, TransientError) and error.may_be_applied:
            self._unanswered = True
        else:
            # The heartbeat was not applied, so the deadline before this heartbeat is still valid.
            self._set_deadline(attempt.deadline, self.ttl)
        consequence = classify_heartbeat_error(
            error, owner_unknown=self._unanswered or self._in_handoff
        )
        if consequence.then == "read":
            if not self.unsettled:
                return HeartbeatDecision("read", consequence.result)
            # `acknowledged_at` in the answer to this pool's ack may be the time at which another
            # worker acknowledged the item. So reading the item would not show who has it.
            consequence = consequence._replace(then="taken")
        return self._retry_or_end_lease(now, consequence, error)

    def _retry_or_end_lease(
        self, now: float, consequence: LeaseErrorConsequence, error: ControlPlaneError
    ) -> HeartbeatDecision:
        if consequence.then == "repeat":
            self._schedule_heartbeat_retry(now, getattr(error, "retry_after", None) or 0.0)
            return HeartbeatDecision("again", consequence.result)
        self.end_lease("lost", "taken" if consequence.then == "read" else consequence.then)
        return HeartbeatDecision("over", consequence.result)

    def _set_deadline(self, deadline: float, ttl: float) -> None:
        if ttl != self.ttl:
            self.ttl, self._margin = ttl, lease_margin(ttl)
        self.deadline = deadline
        self.give_up_at = deadline - self._margin

    def _schedule_heartbeat_retry(self, now: float, retry_after: float = 0.0) -> None:
        part = RETRY_PARTS[min(self._failures, len(RETRY_PARTS) - 1)]
        self._failures += 1
        # Wait for at most half of the remaining time, even if the Retry-After is longer, so that
        # time is left for another try.
        left = self.give_up_at - now
        self.due_at = now + max(self.ttl / part, min(retry_after, left / 2))


def _find_last_heartbeat(item: WorkItem) -> str:
    # The lease of a `starting` item has had no heartbeat yet. If the item has a `last_heartbeat`,
    # that value is from an earlier lease, and the next heartbeat must not send it as the value that
    # the control plane should have.
    fresh = item.state == STARTING or item.last_heartbeat is None
    return NO_HEARTBEAT if fresh else str(item.last_heartbeat)
