"""One beat on its way, what its answer means, and what the leases of one keeper share.

The meanings are pure functions (design §1, Lease before work; §2, its column): a lease heeds them.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from workpool.errors import ConflictError, PreconditionError, RefusedError, TransientError
from workpool.wire.protocol import ACTIVE, NO_HEARTBEAT, QUEUED, STARTING, STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import ControlPlaneError
    from workpool.events import BeatResult, Event
    from workpool.pool.calls import Calls
    from workpool.pool.clock import Clock
    from workpool.wire.items import Heartbeat, WorkItem

Fate = Literal["held", "finished", "released", "stopped", "lost", "detached"]
"""held, or final: our own stop was applied; given up by us; stopped by someone else; not ours; the
child's, or still its parent's."""


class Pulse(Protocol):
    """The keeper, as its leases see it."""

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


class Alarm:
    """A sleep that may be cut short, on the keeper's loop.

    Each lease has one, so it is small: an `asyncio.Event` and a timeout would take two kilobytes.
    """

    __slots__ = ("_rung", "_sleeper")

    def __init__(self) -> None:
        self._rung = False
        self._sleeper: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the sleeper; while nobody sleeps, let the next sleep be none."""
        self._rung = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    async def sleep(self, seconds: float) -> None:
        """Sleep for so long, unless it has rung or rings."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(0.0, seconds), self.ring)
        try:
            if not self._rung:
                self._sleeper = loop.create_future()
                await self._sleeper
        finally:
            timer.cancel()
            self._rung, self._sleeper = False, None


class Retry(NamedTuple):
    """An attempt that settled nothing."""

    at_once: bool = False
    at_least: float = 0.0


class Sent(NamedTuple):
    """A beat on its way: sent when, for how long, under which deadline, how late, as the last?"""

    at: float
    ttl: int
    deadline: float
    lag: float
    last: bool

    def is_plain(self, beat: Heartbeat, now: float) -> bool:
        """It was answered in time, and nothing changes but the deadline."""
        return (
            beat.lease_extended and beat.state == ACTIVE and not self.last and now < self.deadline
        )


async def send(
    calls: Calls, work_id: str, expected: str, ttl: int, patience: float
) -> Heartbeat | ControlPlaneError:
    """Send one beat; an answer that is an error is returned, too (design §2)."""
    try:
        return await calls.heartbeat(work_id, expected, ttl, timeout=patience)
    except (TransientError, RefusedError, ConflictError, PreconditionError) as error:
        return error


class Verdict(NamedTuple):
    """What an error makes of a beat: what it counts as, and what follows.

    Try again while the lease lasts, read the item, or the lease is lost, confirmed or not.
    """

    result: BeatResult
    then: Literal["retry", "read", "lost", "confirmed"]


def verdict_on(error: ControlPlaneError, *, doubted: bool) -> Verdict:
    """Judge an error; `doubted`: a 412 does not yet say that the lease is gone (protocol §4)."""
    if isinstance(error, TransientError):
        return Verdict("timeout" if error.reason == "timeout" else "transient", "retry")
    if isinstance(error, ConflictError):
        return Verdict("conflict", "read")
    if isinstance(error, PreconditionError):
        return Verdict("precondition", "read" if doubted else "confirmed")
    if error.status == HTTPStatus.BAD_REQUEST:
        return Verdict("rejected", "lost")  # our request is wrong: that says not whose the item is
    # Token, proxy, certificate: they may be mended while the lease lasts.
    return Verdict("rejected", "confirmed" if error.status == HTTPStatus.NOT_FOUND else "retry")


def verdict_on_reading(error: ControlPlaneError) -> Verdict:
    """Judge an error of reading the item; a 409 or 412 to a GET is a gateway's, and may pass."""
    if isinstance(error, ConflictError | PreconditionError):
        return Verdict("rejected", "retry")
    return verdict_on(error, doubted=True)


def fate_by(item: WorkItem, ours: WorkItem, lent: str | None = None) -> Fate:
    """Whose an item is that was just read; `ours`: as our acknowledgement returned it.

    If `acknowledged_at` is still our ack's, no worker has taken it since (protocol §4). `lent`: the
    beat that parent and child both expect during a handover. A later one is the other's, or one of
    ours that was left unanswered: in doubt the other's, as two that run one item are worse than
    none.
    """
    if lent is not None and item.state == STARTING:
        return "lost"  # both had it `active`: another worker's ack, whose first beat is to come
    same = ours.acknowledged_at is not None and item.acknowledged_at == ours.acknowledged_at
    if lent is not None and same and item.last_heartbeat != lent:
        return "detached"
    if item.state == STOPPED:
        return "stopped"
    return "held" if same and item.state != QUEUED else "lost"


def expected_by(item: WorkItem) -> str:
    """What our next beat must expect, by an item of ours that was just read (protocol §4)."""
    # In `starting` the field is a former holder's history.
    fresh = item.state == STARTING or item.last_heartbeat is None
    return NO_HEARTBEAT if fresh else str(item.last_heartbeat)
