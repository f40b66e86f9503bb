"""One item that is ours to run, seen through: its lease, its handler, its finish (design §1).

Every item that is served ends in exactly one `SessionFinished`. Lives on the handlers' loop.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from workpool.errors import AttemptsExceeded, ControlPlaneError, SessionGoneError, TransientError
from workpool.events import ItemReclaimed, SessionFinished, SessionStarted, StopRequested
from workpool.pool.attempt import Attempt
from workpool.pool.claim import Cause
from workpool.pool.finish import (
    DRAIN_REASON,
    FINISH_SECONDS,
    MARK_SECONDS,
    RELEASE_DELAY_SECONDS,
    Finisher,
    cut_short,
)
from workpool.pool.handling import Handling
from workpool.pool.handover import settle
from workpool.session import Release, Session

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.events import ReclaimStage
    from workpool.handlers import Handler
    from workpool.pool.claim import Claim
    from workpool.pool.parts import Parts
    from workpool.session import Outcome

log = logging.getLogger(__name__)


class Serving:
    """Serves items whose lease is held, or about to be.

    Attributes:
        draining: No more handlers are started.
        handling: Runs the handlers.
        finisher: Ends the items.
    """

    def __init__(self, parts: Parts, handlers: asyncio.TaskGroup) -> None:
        """Handlers run in `handlers`."""
        self.draining = False
        self.handling = Handling(parts, handlers)
        self.finisher = Finisher(parts)
        self._parts = parts

    async def serve(self, claim: Claim, handler: Handler) -> None:
        """Hold the lease, run the handler, finish; whatever happens, tell the end."""
        redelivered = claim.held_before
        claim.attempt = Attempt(claim.item.metadata, redelivered=redelivered)
        claim.session = Session(
            claim.item, claim, redelivered=redelivered, attempt=claim.attempt.number
        )
        outcome: Outcome | None = None
        try:
            await self._begin(claim)
            if not claim.causes:
                self._parts.observe(SessionStarted(claim.session, claim.label))
                await self.handling.run(claim, handler)
                await _settle_mark(claim)
                await settle(claim)
                self._note_lease(claim)
            outcome = await self.finisher.finish(claim)
        finally:
            outcome = outcome or cut_short(claim)
            if claim.marking is not None:
                claim.marking.cancel()
            self._parts.keeper.end(claim.lease)
            if outcome == "lease_lost" and claim.lease.confirmed:
                self.lost(claim, "run" if claim.lease.begun else "start")
            seconds = self._parts.clock() - claim.acked_at
            self._parts.observe(
                SessionFinished(claim.session, claim.label, outcome, seconds, claim.error)
            )
            # They know each other: left so, only the garbage collector would find them, a hundred
            # objects per session, and stop all handlers meanwhile.
            del claim.session

    async def _begin(self, claim: Claim) -> None:
        """Hold the lease, and note in `causes` whatever forbids to start the handler."""
        lease, keeper = claim.lease, self._parts.keeper
        if self.draining:
            with suppress(SessionGoneError):
                await self.finisher.mark(claim, DRAIN_REASON, MARK_SECONDS)
            lease.release(RELEASE_DELAY_SECONDS)  # its first beat is its last
        keeper.watch(lease)
        if not await lease.begin(self._parts.calls):
            keeper.hold(lease)
            # A drain must not wait until a refused first beat is tried again: its finish does so.
            await claim.until(lambda: lease.settled or self.draining, lease.remaining)
        if lease.settled or not self.draining:
            self._note_lease(claim)
        if not claim.causes and not self.draining and (patch := claim.attempt.opening()):
            await self._open_attempt(claim, patch)
            self._note_lease(claim)
        if lease.stop_requested:
            claim.session.interrupt(stopping=True)
        if self.draining:  # whatever the keeper has learnt since: no handler starts any more
            claim.causes.add(Cause.DRAINED)

    async def _open_attempt(self, claim: Claim, patch: Mapping[str, str | None]) -> None:
        number, limit = claim.attempt.number, self._parts.settings.max_attempts
        if limit and number > limit:
            claim.error = AttemptsExceeded(f"attempt {number} of {limit}")
            claim.causes.add(Cause.RAISED)
            return
        until = asyncio.get_running_loop().time() + FINISH_SECONDS
        try:
            await claim.write_metadata(patch, until)
            claim.attempt.opened()
        except SessionGoneError:
            claim.causes.add(Cause.LOST)
        except TransientError as error:
            # An attempt that is not counted could be repeated for ever: hand it back unrun.
            log.warning("attempt not counted work_id=%s error=%s", claim.item.id, error)
            claim.error = Release("not started: its attempt could not be counted")
            claim.causes.add(Cause.RELEASED)
        except ControlPlaneError as error:
            log.warning("attempt refused work_id=%s error=%s", claim.item.id, error)

    def _note_lease(self, claim: Claim) -> None:
        lease = claim.lease
        if lease.fate == "stopped":
            claim.causes.add(Cause.STOPPED)
        elif lease.fate == "detached":
            claim.causes.add(Cause.DETACHED)
        elif lease.fate == "released":
            return  # nothing may be sent any more, and nobody has taken it from us
        elif not (lease.held and lease.begun):
            claim.causes.add(Cause.LOST)
        elif lease.stop_requested:
            claim.causes.add(Cause.STOP_REQUESTED)

    def lease_changed(self, claim: Claim) -> None:
        """The keeper wrote to the claim's lease: do what follows for its handler."""
        lease = claim.lease
        if lease.ended:
            return  # told too late: nobody needs it any more
        claim.lease_changed()
        if lease.fate == "lost":
            self.handling.cancel(claim, Cause.LOST)
        elif lease.fate == "stopped":
            self.handling.cancel(claim, Cause.STOPPED)
        elif lease.stop_requested and not claim.session.stopping:
            self._parts.observe(StopRequested(claim.item))
            self.handling.request_stop(claim)

    def lost(self, claim: Claim, stage: ReclaimStage) -> None:
        """The control plane said that the item is not ours any more: tell."""
        stage = "drain" if self.draining else stage
        log.info("item lost to another worker work_id=%s stage=%s", claim.item.id, stage)
        self._parts.observe(ItemReclaimed(claim.item, "lost", stage))


async def _settle_mark(claim: Claim) -> None:
    """Wait for the mark that is being written: applied later, it would undo the completion's."""
    if claim.marking is not None:
        await asyncio.wait({claim.marking}, timeout=MARK_SECONDS)
        claim.marking.cancel()
