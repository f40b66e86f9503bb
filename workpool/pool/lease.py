"""One item's lease: its deadline, its beats, and what their answers mean (design §1, §2).

`Lease.keep` runs on the keeper's loop, which writes the lease; the handlers' loop reads it before
every send. Only the first beat is the handlers' loop's (README, D15); a lock that is taken once
decides which of the two writes what came of it. No beat is sent once the lease is over.
"""

from __future__ import annotations

import logging
import random
import threading
from itertools import chain, repeat
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError, TransientError
from workpool.events import HeartbeatFinished
from workpool.pool import beats
from workpool.pool.beats import Alarm, Retry, Sent, expected_by, fate_by, send, verdict_on
from workpool.wire.items import Heartbeat
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    NO_HEARTBEAT,
    STOPPED,
    STOPPING,
    TTL_MAX_SECONDS,
    TTL_MIN_SECONDS,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from workpool.events import BeatResult
    from workpool.pool.beats import Fate, Pulse, Verdict
    from workpool.pool.calls import Calls
    from workpool.pool.handover import Handover
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

RENEW_PART, JITTER = 3, 0.1
"""Renewed every third of the TTL, less up to a tenth of that to spread leases taken together."""
RETRY_PARTS = (60, 30, 15)
"""A failed beat is tried again after these parts of the TTL, the last one repeating."""
TIMEOUT_PART = 6
"""A beat waits no longer for its answer than this part of the TTL."""
MARGIN_SECONDS, MARGIN_PART = 1.0, 10
"""The handler is cancelled this long before the deadline, so that it ends before another starts."""


class Lease:
    """The lease of one acknowledged item.

    Attributes:
        item: The item as our acknowledgement returned it.
        deadline: When it certainly ends, on the lease clock. Written by whoever beats.
        fate: Written on the keeper only.
        confirmed: The control plane said that it is lost; else its time ran out. Likewise.
        begun: The first beat has succeeded. Written by whoever sent it.
        stop_requested: A beat said that an operator wants an end. Written on the keeper only.
        own_stop: A stop of ours may be applied. Written on the handlers' loop only.
        ended: Nobody needs it any more: nothing may be sent. Written on the handlers' loop only.
        on_change: Run on the handlers' loop whenever the above changes. Written there only.
        task: The one that runs `keep`. Used on the keeper only.
    """

    __slots__ = (
        "_alarm", "_expected", "_first", "_first_settled", "_handover", "_lent", "_planned",
        "_pulse", "_release_ttl", "_renewed_at", "_ttl", "_unanswered", "begun", "confirmed",
        "deadline", "ended", "fate", "item", "on_change", "own_stop", "stop_requested", "task",
    )  # fmt: skip

    def __init__(
        self,
        item: WorkItem,
        acked_at: float,
        pulse: Pulse,
        on_change: Callable[[], None],
        parents_beat: str | None = None,
    ) -> None:
        """`acked_at`: when the ack was sent (the first that may be applied), on the lease clock.

        `parents_beat`: what our first one must expect if a parent has handed the item over.
        """
        self.item = item
        self.deadline = acked_at + ACK_LEASE_SECONDS
        self.fate: Fate = "held"
        self.begun = self.confirmed = self.stop_requested = self.own_stop = self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._pulse = pulse
        self.on_change = on_change
        self._ttl = float(ACK_LEASE_SECONDS)
        self._expected = parents_beat or NO_HEARTBEAT
        self._lent = parents_beat is not None  # parent or child, the other may have it
        self._unanswered = False
        self._release_ttl: int | None = None
        self._handover: Handover | None = None
        self._planned = self._renewed_at = pulse.clock()
        self._alarm = Alarm()
        self._first: tuple[Heartbeat | ControlPlaneError, Sent] | None = None
        self._first_settled = threading.Lock()

    # Read on either thread.

    @property
    def held(self) -> bool:
        """The item is ours at this instant: nothing may be sent for it otherwise."""
        return self.fate == "held" and self._pulse.clock() < self.deadline

    @property
    def settled(self) -> bool:
        """The first beat has succeeded, or none ever will."""
        return self.begun or self.fate != "held"

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; 0 when not held."""
        return max(0.0, self.deadline - self._pulse.clock()) if self.fate == "held" else 0.0

    @property
    def give_up_at(self) -> float:
        """When the lease counts as lost for want of a good beat, and the handler is cancelled."""
        return self.deadline - max(MARGIN_SECONDS, self._ttl / MARGIN_PART)

    # Called on the handlers' loop.

    def abandon(self) -> None:
        """The keeper is dead, so nobody renews this lease or writes it: it counts as lost."""
        self._end("lost")

    async def begin(self, calls: Calls) -> bool:
        """Send the first beat; False when what came of it is for the keeper to settle."""
        sent = self._depart()
        try:
            outcome = await self._send(calls, sent)
        except Exception:
            log.exception("first beat crashed work_id=%s", self.item.id)
            self.take_over()
            return False
        if not self._first_settled.acquire(blocking=False):
            return False  # this loop was blocked, and the keeper has taken over
        if isinstance(outcome, Heartbeat) and sent.is_plain(outcome, self._pulse.clock()):
            self._renew(outcome, sent)
            self.begun = True
            return True
        self._first = outcome, sent
        return False

    # Called on the keeper's loop.

    def take_over(self) -> bool:
        """Settle the first beat in the place of a blocked loop; False when that has done it."""
        taken = self._first_settled.acquire(blocking=False)
        self._unanswered = self._unanswered or taken  # it may have been applied
        return taken

    def beat_now(self) -> None:
        """Do not wait for the next beat's time: there is reason to doubt the lease."""
        self._planned = self._pulse.clock()
        self._alarm.ring()

    def release(self, delay: float) -> None:
        """Send one last beat that lets the lease lapse after `delay` seconds, then be silent."""
        self._release_ttl = round(min(max(delay, TTL_MIN_SECONDS), TTL_MAX_SECONDS))
        self.beat_now()

    def hand_over(self, handover: Handover) -> None:
        """Beat once more, then be silent, so that a child can take the item."""
        self._handover = handover
        self.beat_now()

    def expire(self) -> None:
        """Give up at once if the time to has come: timers do not run while a machine sleeps."""
        if self.fate == "held" and self._pulse.clock() >= self.give_up_at:
            self._end("lost")

    async def keep(self) -> None:
        """Beat until the lease is over: at once, unless it has begun."""
        try:
            held = self.begun or await self.beat()
            while held:
                interval = self._ttl / RENEW_PART
                self._planned = self._renewed_at + interval * (1 - JITTER * random.random())  # noqa: S311 - spreads load, guards nothing
                await self.pause(self._planned - self._pulse.clock())
                held = await self.beat()
                if held and self._handover is not None:
                    self._lent = True
                    held = await self._handover.carry_out(self._expected, self._ttl)
                    self._handover = None
        except Exception:
            # A bug here must not leave a handler running on a lease that nobody renews.
            log.exception("lease crashed work_id=%s", self.item.id)
            self._end("lost")

    # Called by a handover, between two beats.

    async def look(self) -> bool:
        """Read whether the child has the item; False: there is no more to wait for."""
        try:
            item = await self._pulse.calls.get(self.item.id, timeout=self._patience())
        except ControlPlaneError:
            return True
        fate = self._fate_by(item)
        if fate != "held":
            self._end(fate, confirmed=fate == "lost")
        # An operator who wants an end must not wait for a child that may not come.
        return fate == "held" and item.state != STOPPING

    # Private to the keeper's loop.

    def _over(self) -> bool:
        self.expire()
        return self.ended or self.fate != "held"

    def _end(self, fate: Fate, *, confirmed: bool = False) -> None:
        if self.fate == "held":
            self.confirmed = confirmed
            self.fate = fate
            self._pulse.tell(self.on_change)

    async def pause(self, seconds: float) -> None:
        """Sleep, unless woken; never past the moment to give up."""
        await self._alarm.sleep(min(seconds, self.give_up_at - self._pulse.clock()))

    async def beat(self) -> bool:
        """Send one beat, again and again, until an answer settles it; False: the lease is over."""
        parts = chain(RETRY_PARTS, repeat(RETRY_PARTS[-1]))
        may_hurry = True
        while not self._over():
            retry = await self._attempt() if self._pulse.renewing else Retry()
            if retry is None:
                return self.fate == "held"
            if retry.at_once and may_hurry:
                may_hurry = False  # a control plane that contradicts itself must not spin us
                self._planned = self._pulse.clock()  # that its answers were slow is no lag of ours
                continue
            # A Retry-After may take half of the time that is left, so that it leaves another try.
            left = self.give_up_at - self._pulse.clock()
            delay = max(self._ttl / next(parts), min(retry.at_least, left / 2))
            self._planned = self._pulse.clock() + delay
            await self.pause(delay)
        return False

    async def _attempt(self) -> Retry | None:
        """Send one beat; None when its answer settled it."""
        if self._first is None:
            sent = self._depart()
            outcome = await self._send(self._pulse.calls, sent)
        else:
            (outcome, sent), self._first = self._first, None
        if isinstance(outcome, Heartbeat):
            return await self._accept(outcome, sent)
        return await self._failed(outcome, sent)

    def _depart(self) -> Sent:
        at, ttl = self._pulse.clock(), self._release_ttl or self._pulse.lease_ttl
        lag, last = max(0.0, at - self._planned), self._release_ttl is not None
        sent = Sent(at, ttl, self.deadline, lag, last)
        # It may cut the lease short and its answer be lost: believe in no more than we ask for.
        self.deadline, self._ttl = min(self.deadline, at + ttl), min(self._ttl, ttl)
        return sent

    async def _send(self, calls: Calls, sent: Sent) -> Heartbeat | ControlPlaneError:
        return await send(calls, self.item.id, self._expected, sent.ttl, self._patience())

    def _patience(self) -> float:
        """How long to wait for an answer: one that never comes must leave time for another try."""
        left = self.give_up_at - self._pulse.clock()
        return max(0.001, min(self._pulse.request_timeout, self._ttl / TIMEOUT_PART, left))

    def _renew(self, beat: Heartbeat, sent: Sent) -> None:
        self._unanswered = self._lent = False
        self._expected = beat.last_heartbeat
        if beat.lease_extended:
            self._ttl = beat.ttl_seconds
            self.deadline = sent.at + beat.ttl_seconds
        self._renewed_at = sent.at
        self._observe("ok", sent.lag)

    async def _accept(self, beat: Heartbeat, sent: Sent) -> Retry | None:
        if self._pulse.clock() >= sent.deadline:
            # Too late: between that deadline and this answer the item may have been another's.
            self._observe("timeout", sent.lag)
            self._end("lost")
            return None
        if not beat.lease_extended and beat.state != STOPPING:
            self._unanswered, self._expected = False, beat.last_heartbeat
            return await self._read("conflict", sent.lag)
        self._renew(beat, sent)
        if beat.state == STOPPED:
            self._end("finished" if self.own_stop else "stopped")
            return None
        asked = beat.state == STOPPING and not self.stop_requested and not self.own_stop
        news = asked or not self.begun
        self.begun, self.stop_requested = True, self.stop_requested or asked
        if sent.last:
            self._end("released")
        elif news:
            self._pulse.tell(self.on_change)
        return None

    async def _failed(self, error: ControlPlaneError, sent: Sent) -> Retry | None:
        if isinstance(error, TransientError) and error.reason != "throttled":
            self._unanswered = True
        else:
            self.deadline = sent.deadline  # certainly not applied, so nothing was cut
        verdict = verdict_on(error, doubted=self._unanswered or self._lent)
        if verdict.then == "read":
            return await self._read(verdict.result, sent.lag)
        return self._heed(verdict, error, sent.lag)

    def _heed(self, verdict: Verdict, error: ControlPlaneError, lag: float) -> Retry | None:
        self._observe(verdict.result, lag)
        if verdict.then == "retry":
            return Retry(at_least=getattr(error, "retry_after", None) or 0.0)
        self._end("lost", confirmed=verdict.then == "confirmed")
        return None

    async def _read(self, doubt: BeatResult, lag: float) -> Retry | None:
        """Find out whose the item is, after an answer that leaves it open: ours, beat at once.

        `doubt` is what the answer counts as if the item is not ours.
        """
        try:
            item = await self._pulse.calls.get(self.item.id, timeout=self._patience())
        except ControlPlaneError as error:
            self._unanswered = True  # still in doubt: the next 412 must be read again
            return self._heed(beats.verdict_on_reading(error), error, lag)
        fate = self._fate_by(item)
        self._observe("recovered" if fate == "held" else doubt, lag)
        if fate != "held":
            self._end(fate, confirmed=fate == "lost")
            return None
        self._unanswered = False
        self._expected = expected_by(item)
        return Retry(at_once=True)

    def _fate_by(self, item: WorkItem) -> Fate:
        fate = fate_by(item, self.item, self._expected if self._lent else None)
        return "finished" if fate == "stopped" and self.own_stop else fate

    def _observe(self, result: BeatResult, lag: float) -> None:
        self._pulse.observe(HeartbeatFinished(self.item, result, lag))
