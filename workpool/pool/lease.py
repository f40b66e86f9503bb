"""One item's lease: its deadline, its beats, and what their answers mean (design §1, §2).

`Lease.keep` runs on the keeper's loop, which alone writes the lease; the handlers' loop reads it
before every send and never waits for it. No beat is sent once the lease is over.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from http import HTTPStatus
from itertools import chain, repeat
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from workpool.errors import ConflictError, PreconditionError, RefusedError, TransientError
from workpool.events import HeartbeatFinished
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    NO_HEARTBEAT,
    QUEUED,
    STARTING,
    STOPPED,
    STOPPING,
    TTL_MAX_SECONDS,
    TTL_MIN_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import ControlPlaneError
    from workpool.events import BeatResult, Event
    from workpool.pool.calls import Calls
    from workpool.pool.clock import Clock
    from workpool.wire.items import Heartbeat, WorkItem

log = logging.getLogger(__name__)

Fate = Literal["held", "finished", "released", "stopped", "lost"]
"""held, or final: our own stop was applied; given up by us; stopped by someone else; not ours."""

RENEW_PART = 3
"""A lease is renewed every third of its TTL …"""
JITTER = 0.1
"""… less up to this part of that, so that leases taken together spread out."""
RETRY_PARTS = (60, 30, 15)
"""A failed beat is tried again after these parts of the TTL, the last one repeating."""
TIMEOUT_PART = 6
"""A beat waits no longer for its answer than this part of the TTL."""
MARGIN_SECONDS, MARGIN_PART = 1.0, 10
"""The handler is cancelled this long before the deadline, so that it ends before another starts."""


class Pulse(Protocol):
    """What the leases of one keeper share."""

    clock: Clock
    request_timeout: float
    lease_ttl: int

    @property
    def calls(self) -> Calls:
        """The keeper's own connection."""

    @property
    def renewing(self) -> bool:
        """False while the handlers' loop has been blocked for `max_block`: nothing is sent."""

    def observe(self, event: Event) -> None:
        """Tell the observers."""

    def tell(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the handlers' loop."""


class _Retry(NamedTuple):
    """An attempt that settled nothing."""

    at_once: bool = False
    at_least: float = 0.0


class _Sent(NamedTuple):
    """A beat on its way: sent when, under which deadline, how late, and as a release's last?"""

    at: float
    deadline: float
    lag: float
    last: bool


class Lease:
    """The lease of one acknowledged item.

    Attributes:
        item: The item as our acknowledgement returned it.
        deadline: When it certainly ends, on the lease clock. Written on the keeper only.
        fate: Written on the keeper only.
        confirmed: The control plane said that it is lost; otherwise its time ran out. Written on
            the keeper only.
        begun: The first beat has succeeded. Written on the keeper only.
        stop_requested: A beat said that an operator wants an end. Written on the keeper only.
        own_stop: We sent a stop, so a 409 is its success. Written on the handlers' loop only.
        ended: Nobody needs it any more: nothing may be sent. Written on the handlers' loop only.
        on_change: Run on the handlers' loop whenever the above changes. Written there only.
        task: The one that runs `keep`. Used on the keeper only.
    """

    __slots__ = (
        "_expected",
        "_planned",
        "_pulse",
        "_release_ttl",
        "_renewed_at",
        "_ttl",
        "_unanswered",
        "_wake",
        "begun",
        "confirmed",
        "deadline",
        "ended",
        "fate",
        "item",
        "on_change",
        "own_stop",
        "stop_requested",
        "task",
    )

    def __init__(
        self, item: WorkItem, acked_at: float, pulse: Pulse, on_change: Callable[[], None]
    ) -> None:
        """`acked_at`: when the ack was sent (the first that may be applied), on the lease clock."""
        self.item = item
        self.deadline = acked_at + ACK_LEASE_SECONDS
        self.fate: Fate = "held"
        self.confirmed = False
        self.begun = False
        self.stop_requested = False
        self.own_stop = False
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self._pulse = pulse
        self.on_change = on_change
        self._ttl = float(ACK_LEASE_SECONDS)
        self._expected = NO_HEARTBEAT
        self._unanswered = False
        self._release_ttl: int | None = None
        self._planned = self._renewed_at = pulse.clock()
        self._wake = asyncio.Event()

    # Read on either thread.

    @property
    def held(self) -> bool:
        """The item is ours at this instant: nothing may be sent for it otherwise."""
        return self.fate == "held" and self._pulse.clock() < self.deadline

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

    # Called on the keeper's loop.

    def beat_now(self) -> None:
        """Do not wait for the next beat's time: there is reason to doubt the lease."""
        self._planned = self._pulse.clock()
        self._wake.set()

    def release(self, delay: float) -> None:
        """Send one last beat that lets the lease lapse after `delay` seconds, then be silent."""
        self._release_ttl = round(min(max(delay, TTL_MIN_SECONDS), TTL_MAX_SECONDS))
        self.beat_now()

    def expire(self) -> None:
        """Give up at once if the time to has come: timers do not run while a machine sleeps."""
        if self.fate == "held" and self._pulse.clock() >= self.give_up_at:
            self._end("lost")

    async def keep(self) -> None:
        """Beat until the lease is over. The first beat goes out at once."""
        try:
            while await self._beat():
                interval = self._ttl / RENEW_PART
                self._planned = self._renewed_at + interval * (1 - JITTER * random.random())  # noqa: S311 - spreads load, guards nothing
                await self._pause(self._planned - self._pulse.clock())
        except Exception:
            # A bug here must not leave a handler running on a lease that nobody renews.
            log.exception("lease crashed work_id=%s", self.item.id)
            self._end("lost")

    # Private to the keeper's loop.

    def _over(self) -> bool:
        self.expire()
        return self.ended or self.fate != "held"

    def _end(self, fate: Fate, *, confirmed: bool = False) -> None:
        if self.fate == "held":
            self.confirmed = confirmed
            self.fate = fate
            self._pulse.tell(self.on_change)

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless woken; never past the moment to give up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, self.give_up_at - self._pulse.clock())):
                await self._wake.wait()
        self._wake.clear()

    async def _beat(self) -> bool:
        """Send one beat, again and again, until an answer settles it; False: the lease is over."""
        parts = chain(RETRY_PARTS, repeat(RETRY_PARTS[-1]))
        may_hurry = True
        while not self._over():
            retry = await self._attempt() if self._pulse.renewing else _Retry()
            if retry is None:
                return self.fate == "held"
            if retry.at_once and may_hurry:
                may_hurry = False  # a control plane that contradicts itself must not spin us
                continue
            # A Retry-After may take half of the time that is left, so that it leaves another try.
            left = self.give_up_at - self._pulse.clock()
            delay = max(self._ttl / next(parts), min(retry.at_least, left / 2))
            self._planned = self._pulse.clock() + delay
            await self._pause(delay)
        return False

    async def _attempt(self) -> _Retry | None:
        """Send one beat; None when its answer settled it."""
        at, last = self._pulse.clock(), self._release_ttl is not None
        ttl = self._release_ttl or self._pulse.lease_ttl
        sent = _Sent(at, self.deadline, max(0.0, at - self._planned), last)
        # It may cut the lease short and its answer be lost: believe in no more than we ask for.
        self.deadline, self._ttl = min(self.deadline, at + ttl), min(self._ttl, ttl)
        try:
            beat = await self._pulse.calls.heartbeat(
                self.item.id, self._expected, ttl, timeout=self._patience()
            )
        except (TransientError, RefusedError, ConflictError, PreconditionError) as error:
            return await self._failed(error, sent)
        return await self._accept(beat, sent)

    def _patience(self) -> float:
        """How long to wait for an answer: one that never comes must leave time for another try."""
        left = self.give_up_at - self._pulse.clock()
        return max(0.001, min(self._pulse.request_timeout, self._ttl / TIMEOUT_PART, left))

    async def _accept(self, beat: Heartbeat, sent: _Sent) -> _Retry | None:
        if self._pulse.clock() >= sent.deadline:
            # Too late: between that deadline and this answer the item may have been another's.
            self._observe("timeout", sent.lag)
            self._end("lost")
            return None
        self._unanswered = False
        self._expected = beat.last_heartbeat
        if beat.lease_extended:
            self._ttl = beat.ttl_seconds
            self.deadline = sent.at + beat.ttl_seconds
        elif beat.state != STOPPING:
            return await self._read("conflict", sent.lag)
        self._renewed_at = sent.at
        self._observe("ok", sent.lag)
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

    async def _failed(self, error: ControlPlaneError, sent: _Sent) -> _Retry | None:
        """What an error makes of a beat: design §2, its column."""
        if isinstance(error, TransientError) and error.reason != "throttled":
            self._unanswered = True
        else:
            self.deadline = sent.deadline  # certainly not applied, so nothing was cut
        if isinstance(error, TransientError):
            return self._transient(error, sent.lag)
        if isinstance(error, RefusedError):
            return self._refused(error, sent.lag)
        conflict = isinstance(error, ConflictError)
        doubt: BeatResult = "conflict" if conflict else "precondition"
        if not self.own_stop if conflict else self._unanswered:
            return await self._read(doubt, sent.lag)
        self._observe(doubt, sent.lag)
        self._end("finished" if conflict else "lost", confirmed=not conflict)
        return None

    def _transient(self, error: TransientError, lag: float) -> _Retry:
        self._observe("timeout" if error.reason == "timeout" else "transient", lag)
        return _Retry(at_least=error.retry_after or 0.0)

    def _refused(self, error: RefusedError, lag: float) -> _Retry | None:
        self._observe("rejected", lag)
        if error.status not in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
            return _Retry()  # token, proxy, certificate: may be mended while the lease lasts
        # Only "unknown" says that it is not ours; a 400 says that our request is wrong.
        self._end("lost", confirmed=error.status == HTTPStatus.NOT_FOUND)
        return None

    async def _read(self, doubt: BeatResult, lag: float) -> _Retry | None:
        """Find out whose the item is, after an answer that leaves it open (protocol §4).

        If `acknowledged_at` is still our ack's, nobody else has taken it: beat again at once from
        what the item says. `doubt` is what the answer counts as if the item is not ours.
        """
        try:
            item = await self._pulse.calls.get(self.item.id, timeout=self._patience())
        except TransientError as error:
            self._unanswered = True  # still in doubt: the next 412 must be read again
            return self._transient(error, lag)
        except RefusedError as error:
            return self._refused(error, lag)
        if item.state == STOPPED:
            self._observe(doubt, lag)
            self._end("finished" if self.own_stop else "stopped")
            return None
        acked = self.item.acknowledged_at
        if acked is None or item.acknowledged_at != acked or item.state == QUEUED:
            self._observe(doubt, lag)
            self._end("lost", confirmed=True)
            return None
        self._observe("recovered", lag)
        self._unanswered = False
        # In `starting` the field is a former holder's history.
        fresh = item.state == STARTING or item.last_heartbeat is None
        self._expected = NO_HEARTBEAT if fresh else str(item.last_heartbeat)
        return _Retry(at_once=True)

    def _observe(self, result: BeatResult, lag: float) -> None:
        self._pulse.observe(HeartbeatFinished(self.item, result, lag))
