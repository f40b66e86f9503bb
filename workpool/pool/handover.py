"""Handing an item over to a child: a program of its own that keeps the lease from then on.

Our beats are suspended, the handler starts the child, and the child's first beat takes the item
(design §1, Finish: `detached`). That beat and our next one expect the same, our last, so that only
one of the two succeeds. Until it is known which, nothing else is sent for the item: stops and
metadata carry no precondition on the wire.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from workpool.backoff import Backoff
from workpool.errors import HandoverError, SessionEnded
from workpool.session import HandedLease

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.pool.beats import Pulse
    from workpool.pool.claim import Claim
    from workpool.pool.lease import Lease

log = logging.getLogger(__name__)

LOOK_SECONDS, LOOK_CAP_SECONDS = 0.2, 2.0
"""How often the item is read while its child is expected."""
TAKE_BACK_PART = 4
"""So much of the TTL before it would be given up, an item without a child is taken back."""


class Handover:
    """One attempt to hand an item over. Made on the handlers' loop, carried out on the keeper's.

    Attributes:
        state: asked; open: our beats are suspended; closed: the lease is ours again, or over.
            Written on the keeper only.
        last_heartbeat: What the child must expect, once open. Likewise.
        ttl: Seconds that our last beat was granted, once open. Likewise.
    """

    __slots__ = (
        "_expecting",
        "_lease",
        "_looks",
        "_pulse",
        "_taken_back",
        "last_heartbeat",
        "state",
        "ttl",
    )

    def __init__(self, lease: Lease, pulse: Pulse) -> None:
        self.state: Literal["asked", "open", "closed"] = "asked"
        self.last_heartbeat = ""
        self.ttl = 0
        self._lease = lease
        self._pulse = pulse
        self._expecting = self._taken_back = False
        self._looks = Backoff(LOOK_SECONDS, LOOK_CAP_SECONDS)

    # Called on the keeper's loop.

    def expect_child(self) -> None:
        """The child has been started."""
        self._expecting = True
        self._lease.beat_now()

    def take_back(self) -> None:
        """There will be no child, or it is not waited for any more."""
        self._taken_back = True
        self._lease.beat_now()

    async def carry_out(self, last_heartbeat: str, ttl: float) -> bool:
        """Send nothing until a child has the item, or it must be ours again; False: it is over.

        Called between two beats: none is on its way, and the last one's answer is known.
        """
        self.last_heartbeat, self.ttl = last_heartbeat, round(ttl)
        self._turn("open")
        lease, clock = self._lease, self._pulse.clock
        until = lease.give_up_at - ttl / TAKE_BACK_PART  # leaves time for the beat that does it
        looking = True
        while looking and not self._taken_back and (left := until - clock()) > 0:
            await lease.pause(min(left, self._looks.next()) if self._expecting else left)
            looking = not self._expecting or await lease.look()
        held = await lease.beat()
        self._turn("closed")
        return held

    def _turn(self, state: Literal["open", "closed"]) -> None:
        self.state = state
        self._pulse.tell(self._lease.on_change)


@asynccontextmanager
async def hand_over(claim: Claim) -> AsyncIterator[HandedLease]:
    """Hand a claim's item over: see `Session.handover`. Used on the handlers' loop."""
    claim.check()
    lease = claim.lease
    claim.handover = handover = Handover(lease, claim.parts.keeper)
    claim.cut_sends()
    claim.parts.keeper.prompt(lease, lambda: lease.hand_over(handover))
    try:
        yield await _opened(claim, handover)
        claim.parts.keeper.prompt(lease, handover.expect_child)
        await _reaches(claim, handover, "closed")
    except asyncio.CancelledError:
        claim.parts.keeper.prompt(lease, handover.take_back)
        raise  # whoever cancels a handler waits for its end only; `settle` does the rest
    except BaseException:
        await settle(claim)
        raise
    if lease.fate != "detached":
        claim.check_lease()
        raise HandoverError(claim.item.id)


async def settle(claim: Claim) -> None:
    """See that no handover is under way any more: then it is known whose the item is."""
    handover = claim.handover
    if handover is not None and handover.state != "closed":
        claim.parts.keeper.prompt(claim.lease, handover.take_back)
        await _reaches(claim, handover, "closed")
    if claim.lease.fate == "detached":
        log.info("handed over work_id=%s", claim.item.id)


async def _opened(claim: Claim, handover: Handover) -> HandedLease:
    await _reaches(claim, handover, "open")
    if handover.state != "open" or claim.lease.fate != "held":
        claim.check_lease()
        raise HandoverError(claim.item.id)  # there was no time left for a child
    if claim.lease.stop_requested:  # a child would be started only to be stopped
        raise SessionEnded(claim.item.id)
    item, settings = claim.item, claim.parts.settings
    return HandedLease(
        work_id=item.id,
        environment_id=item.environment_id,
        last_heartbeat=handover.last_heartbeat,
        ttl=handover.ttl,
        base_url=settings.base_url,
        dialect=settings.dialect,
    )


async def _reaches(claim: Claim, handover: Handover, state: str) -> None:
    """Wait until the handover is that far, or the lease over, which its end bounds."""
    lease, states = claim.lease, {state, "closed"}
    await claim.until(lambda: handover.state in states or lease.fate != "held", lease.remaining)
