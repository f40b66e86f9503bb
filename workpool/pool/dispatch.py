"""From a delivered item to the end of its session: who owns it, and when a slot takes it.

Owns the ids that are ours: one is given up only after its handler has ended and its finish is over
(design §1). Lives on the handlers' loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter, OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError, PluginError, SessionGoneError
from workpool.events import ItemClaimed, ItemDeclined, ItemReclaimed
from workpool.pool.acknowledge import Acknowledger
from workpool.pool.claim import Cause, Claim
from workpool.pool.finish import FINISH_SECONDS
from workpool.pool.lease import Lease
from workpool.pool.serve import Serving
from workpool.wire.protocol import HEALTHCHECK

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import DeclineReason, Origin
    from workpool.handlers import Handler
    from workpool.pool.parts import Parts
    from workpool.wire.items import WorkItem

log = logging.getLogger(__name__)

REMEMBERED_IDS = 10_000
"""How many ids are remembered, to tell redeliveries and to log a declined item once."""


class Dispatcher:
    """Owns the items that are ours, and runs each in a task of `group`.

    Attributes:
        owned: By work id, from delivery to the end of the finish.
        tasks: One per item in a slot.
        draining: No more handlers are started.
    """

    def __init__(self, parts: Parts, group: asyncio.TaskGroup, handlers: asyncio.TaskGroup) -> None:
        """Items are served in `group`, their handlers run in `handlers`."""
        self.owned: dict[str, Claim] = {}
        self.tasks: dict[asyncio.Task[None], Claim] = {}
        self.draining = False
        self._parts = parts
        self._group = group
        self._acknowledger = Acknowledger(parts)
        self._serving = Serving(parts, handlers)
        self._sessions: dict[str, str] = {}  # by work id, as delivered
        self._taken: set[str] = set()  # their values, of which there may be ten thousand
        self._busy: Counter[Handler] = Counter()
        self._handed: OrderedDict[str, bool] = OrderedDict()  # id → its decline is logged

    @property
    def stuck(self) -> int:
        """Handlers that ignore their cancellation."""
        return len(self._serving.handling.stuck)

    def on_stuck(self, callback: Callable[[], None]) -> None:
        """Call this whenever there is one more of them."""
        self._serving.handling.on_stuck = callback

    # Claim and choose.

    def offer(self, item: WorkItem) -> bool:
        """Decide on a delivered item; True when it is ours and took the reserved place."""
        if self.draining:
            return False  # never acknowledged, so it comes back
        now = self._parts.clock()
        owned = self.owned.get(item.id)
        held_before = item.acknowledged_at is not None or item.last_heartbeat is not None
        seen = held_before or item.id in self._handed
        origin: Origin = "duplicate" if owned else "redelivered" if seen else "new"
        self._parts.observe(ItemClaimed(item, origin, _age(item)))
        if owned is not None:
            self._doubt(owned, now)
            return False
        self._remember(item.id)
        if item.type == HEALTHCHECK:
            handler = None
        elif (handler := self._choose(item)) is None:
            return False
        if held_before:
            self._parts.observe(ItemReclaimed(item, "gained", "poll"))
        claim = self.owned[item.id] = Claim(item, handler, self._parts, now)
        if handler is not None:
            if item.session_id:  # other types of item may have none
                self._sessions[item.id] = item.session_id
                self._taken.add(item.session_id)
            self._busy[handler] += 1
        self._parts.queue.put(claim)
        self._fill()
        return True

    async def adopt(self, item: WorkItem, parents_beat: str) -> None:
        """Serve an item that was handed over to us, in the place of its parent."""
        handler = self._parts.plugins.handler_for(item)
        claim = self.owned[item.id] = Claim(item, handler, self._parts, self._parts.clock())
        claim.parents_beat, claim.held_before = parents_beat, False
        if handler is not None:
            self._busy[handler] += 1
        await self._parts.queue.reserve()
        self._parts.queue.put(claim)
        self._fill()

    def _doubt(self, owned: Claim, now: float) -> None:
        """We were handed a copy of an item that is ours: the server thinks that it is queued."""
        if owned.executing:
            self._parts.keeper.beat_now(owned.lease)
        else:
            owned.delivered_at = now

    def _choose(self, item: WorkItem) -> Handler | None:
        """Ask the plugins; None when the item is left for others."""
        handler = None
        reason: DeclineReason | None = None
        if item.session_id in self._taken:
            reason = "busy"
        else:
            try:
                handler = self._parts.plugins.handler_for(item)
            except PluginError:
                reason = "plugin_error"
            else:
                reason = self._objection(handler)
        if reason is None:
            return handler
        if not self._handed[item.id]:
            self._handed[item.id] = True
            log.info("item declined work_id=%s type=%s reason=%s", item.id, item.type, reason)
        self._parts.observe(ItemDeclined(item, reason))
        return None

    def _objection(self, handler: Handler | None) -> DeclineReason | None:
        if handler is None:
            return "unwanted"
        full = handler.max_sessions is not None and self._busy[handler] >= handler.max_sessions
        return "busy" if full else None

    def _remember(self, work_id: str) -> None:
        if work_id not in self._handed:
            self._handed[work_id] = False
            if len(self._handed) > REMEMBERED_IDS:
                self._handed.popitem(last=False)

    def _fill(self) -> None:
        """Start what waits in the slots that are free."""
        while not self.draining and (claim := self._parts.queue.take()) is not None:
            task = self._group.create_task(self._work(claim), name=claim.item.id)
            self.tasks[task] = claim
            task.add_done_callback(self.tasks.pop)

    # Serve.

    async def _work(self, claim: Claim) -> None:
        try:
            adopted = claim.parents_beat
            result = "ok" if adopted is not None else await self._acknowledger.acknowledge(claim)
            if result == "ok":
                changed = functools.partial(self._serving.lease_changed, claim)
                keeper = self._parts.keeper
                claim.lease = Lease(claim.item, claim.acked_at, keeper, changed, adopted)
                serve = self._serving.serve
                await (serve(claim, claim.handler) if claim.handler else self._answer(claim))
            elif result == "conflict":
                self._serving.lost(claim, "ack")
        finally:
            self._disown(claim)
            self._parts.queue.release()
            self._fill()

    async def _answer(self, claim: Claim) -> None:
        """A health check asks whether anybody is there: it is, so the item is done."""
        until = asyncio.get_running_loop().time() + FINISH_SECONDS
        try:
            await self._serving.finisher.stop(claim, until)
        except (ControlPlaneError, SessionGoneError) as error:
            log.warning("health check not stopped work_id=%s error=%s", claim.item.id, error)

    def _disown(self, claim: Claim) -> None:
        del self.owned[claim.item.id]
        if claim.handler is not None:
            self._taken.discard(self._sessions.pop(claim.item.id, ""))
            self._busy[claim.handler] -= 1

    # Drain.

    def drain(self) -> None:
        """Start nothing more; tell the running sessions."""
        self.draining = self._serving.draining = True
        self._acknowledger.drain()
        for claim in self._parts.queue.forget_waiting():
            self._disown(claim)
        for claim in self.owned.values():
            claim.wake()
            if claim.executing:
                claim.session.interrupt(draining=True)
                mark = self._serving.finisher.mark_running(claim)
                claim.marking = self._group.create_task(mark, name=f"mark {claim.item.id}")

    def release_all(self) -> None:
        """The drain's deadline has come: cancel what still runs and hand it back."""
        for claim in list(self.owned.values()):
            self._serving.handling.cancel(claim, Cause.DRAINED)

    def unfinished(self) -> set[asyncio.Task[None]]:
        """What a drain waits for: all but the handlers that ignore their cancellation."""
        stuck = self._serving.handling.stuck
        return {
            task for task, claim in self.tasks.items() if not task.done() and claim not in stuck
        }

    def abandon(self) -> int:
        """The drain is over: leave behind whatever has not ended, and say how much that is."""
        left = [task for task in self.tasks if not task.done()]
        for task in left:
            task.cancel()
        return len(left)


def _age(item: WorkItem) -> float | None:
    if item.created_at is None:
        return None
    return max(0.0, (datetime.now(UTC) - item.created_at).total_seconds())
