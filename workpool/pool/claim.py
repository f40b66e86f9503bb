"""One item while it is ours: from its delivery until its handler has ended and its finish is over.

Owns what may be sent for the item. Every send first asks, with no await between, whether the lease
is held, and is cut short the moment it is not (design §1, Finish). Used on the handlers' loop only.
"""

from __future__ import annotations

import asyncio
import enum
import math
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from workpool.backoff import Backoff
from workpool.errors import LeaseLost, SessionEnded, TransientError
from workpool.pool.handover import hand_over

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from workpool.handlers import Handler
    from workpool.pool.attempt import Attempt
    from workpool.pool.handover import Handover
    from workpool.pool.lease import Lease
    from workpool.pool.parts import Parts
    from workpool.session import HandedLease, Session
    from workpool.wire.items import WorkItem
    from workpool.wire.session_events import SessionEvents

T = TypeVar("T")

RETRY_SECONDS, RETRY_CAP_SECONDS = 0.2, 3.0
EVENTS_SECONDS = 60.0
"""How long a handler's `events.send` is tried: a default lease."""
UPDATE_SECONDS = 30.0
"""How long a handler's `update_metadata` is tried."""


class Cause(enum.IntEnum):
    """What ended a session, in the order of the finish table: the greatest wins."""

    RETURNED = enum.auto()
    RAISED = enum.auto()
    TIMED_OUT = enum.auto()
    DRAINED = enum.auto()
    RELEASED = enum.auto()
    STOP_REQUESTED = enum.auto()
    DETACHED = enum.auto()
    STOPPED = enum.auto()
    LOST = enum.auto()


class Claim:
    """One item that is ours.

    Attributes:
        item: As the poll delivered it, then as our acknowledgement returned it.
        held_before: It had been held, here or elsewhere, when it was delivered.
        parts: Those of its pool.
        marking: The task that writes the mark of a drain while the handler runs, if one does.
        handler: Who will run it; None for an item that the pool answers by itself.
        delivered_at: When the last poll that brought it was answered, on the lease clock.
        acked_at: When the first ack that may have been applied was sent, on the lease clock.
        parents_beat: The last one of the parent that has handed the item over to us, if one has.
        handover: The last attempt to hand the item over.
        running: The handler's task, from its start.
        cancelled: We have cancelled the handler.
        causes: Why the session ends, as far as known.
        error: What the handler raised, or why what it returned cannot be written.
        result: The mapping that it returned.
    """

    __slots__ = (
        "_changed",
        "_scopes",
        "acked_at",
        "attempt",
        "cancelled",
        "causes",
        "delivered_at",
        "error",
        "handler",
        "handover",
        "held_before",
        "item",
        "lease",
        "marking",
        "parents_beat",
        "parts",
        "result",
        "running",
        "session",
    )

    lease: Lease
    """Set once the item is acknowledged."""
    session: Session
    """Set once the item is acknowledged, if it has a handler."""
    attempt: Attempt
    """Set together with `session`."""

    def __init__(self, item: WorkItem, handler: Handler | None, parts: Parts, now: float) -> None:
        self.item = item
        self.held_before = item.acknowledged_at is not None or item.last_heartbeat is not None
        self.handler = handler
        self.delivered_at = now
        self.acked_at = now
        self.parents_beat: str | None = None
        self.handover: Handover | None = None
        self.running: asyncio.Task[object] | None = None
        self.marking: asyncio.Task[None] | None = None
        self.cancelled = False
        self.causes: set[Cause] = set()
        self.error: BaseException | None = None
        self.result: Mapping[str, str] = {}
        self.parts = parts
        self._changed: asyncio.Event | None = None  # made by the first who waits; most never do
        self._scopes: set[asyncio.Timeout] = set()

    @property
    def label(self) -> str:
        """The handler's name for metrics and logs."""
        return "none" if self.handler is None else self.handler.name

    @property
    def executing(self) -> bool:
        """Its handler has been called and has not ended yet, cancelled or not."""
        return self.running is not None and not self.running.done()

    def cancel(self, cause: Cause) -> bool:
        """Cancel the handler, once; False when there is nothing to cancel or it was done before."""
        if self.running is None or self.running.done():
            return False
        self.causes.add(cause)
        if self.cancelled:
            return False
        self.cancelled = True
        self.running.cancel()
        return True

    def lease_changed(self) -> None:
        """The keeper wrote to the lease: wake whoever waits, and cut what must not be sent."""
        self.wake()
        if self.lease.fate != "held":
            self.cut_sends()

    def wake(self) -> None:
        """Let whoever waits in `until` look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed.clear()

    async def until(self, met: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until a change meets the condition; no longer than so many seconds."""
        changed = self._changed = self._changed or asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not met():
                    await changed.wait()

    def cut_sends(self) -> None:
        """Wait for no answer any more to what was sent for the item, and send none again."""
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():  # one that times out at this moment is cut already
                scope.reschedule(now)

    # What a session needs (workpool.session.Held).

    @property
    def remaining(self) -> float:
        """Seconds until the lease must be taken for lost; 0 when nobody keeps it any more."""
        return 0.0 if self.lease.ended else self.lease.remaining

    def check(self) -> None:
        """Raise unless the handler may send something for the item."""
        self.check_lease()
        if self.cancelled or not self.executing:
            raise SessionEnded(self.item.id)

    def check_lease(self) -> None:
        """Raise unless the item is ours, and nobody else's, at this instant."""
        lent = self.handover is not None and self.handover.state != "closed"
        if lent or not self.lease.held:
            ended = self.lease.fate in {"stopped", "detached"}
            raise (SessionEnded if ended else LeaseLost)(self.item.id)

    def hand_over(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item over to a child."""
        return hand_over(self)

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata for the handler, tried for `UPDATE_SECONDS`."""
        until = asyncio.get_running_loop().time() + UPDATE_SECONDS
        return await self.send(self._update(patch), until, self.check)

    def events(self) -> SessionEvents:
        """The events of the item's session, for the handler."""
        token = self.item.sessions_token
        return self.parts.calls.events(self.item.session_id, token=token, guard=self)

    async def carry(self, call: Callable[[], Awaitable[T]]) -> T:
        """Send something for the handler, tried for `EVENTS_SECONDS`."""
        until = asyncio.get_running_loop().time() + EVENTS_SECONDS
        return await self.send(call, until, self.check)

    async def within(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Await `call()`, made anew whenever the lease was renewed meanwhile.

        Raises:
            SessionGoneError: The item is not the handler's any more, told as soon as it is not.
            TimeoutError: After `seconds`.
        """
        loop = asyncio.get_running_loop()
        until = math.inf if seconds is None else loop.time() + seconds
        while True:
            self.check()
            try:
                return await self._cut(call, until - loop.time())
            except TimeoutError:
                self.check()
                if loop.time() >= until:
                    raise

    async def write_metadata(self, patch: Mapping[str, str | None], until: float) -> None:
        """Write metadata for the pool. `until` is on the loop's clock."""
        await self.send(self._update(patch), until, self.check_lease)

    def _update(self, patch: Mapping[str, str | None]) -> Callable[[], Awaitable[WorkItem]]:
        return lambda: self.parts.calls.update_metadata(self.item.id, patch)

    async def send(
        self,
        call: Callable[[], Awaitable[T]],
        until: float,
        check: Callable[[], None],
    ) -> T:
        """Make a call that needs the lease, again until it is settled or `until` has come.

        Raises:
            SessionGoneError: From `check`, made right before every try.
            ControlPlaneError: Refused, in conflict, or still transient at the end.
        """
        loop = asyncio.get_running_loop()
        backoff = Backoff(RETRY_SECONDS, RETRY_CAP_SECONDS)
        while True:
            check()
            try:
                return await self._cut(call, until - loop.time())
            except TransientError as error:
                failure = error
            except TimeoutError:
                failure = TransientError("call", None, "no answer in time", reason="timeout")
            check()
            # A Retry-After may take half of the time that is left, so that it leaves another try: a
            # session that is done must not be run again because of a 429.
            left = until - loop.time()
            delay = max(backoff.next(), min(failure.retry_after or 0.0, left / 2))
            if delay >= left:
                raise failure
            await asyncio.sleep(delay)

    async def _cut(self, call: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Await `call()`, at most for `seconds` and never past the lease's end as it is known."""
        scope = asyncio.timeout(min(seconds, self.lease.remaining))
        self._scopes.add(scope)
        try:
            async with scope:
                return await call()
        finally:
            self._scopes.discard(scope)
