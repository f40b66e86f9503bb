"""Decides for each received item whether the pool accepts it, and with which handler it starts.

It owns the pool's items and the tasks that run them. Lives on the handlers' loop.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from workpool.errors import PluginError
from workpool.events import ItemDeclined, ItemReceived, ItemReclaimed
from workpool.log_fields import pool_logger
from workpool.logs import readable
from workpool.pool.claim import Claimer
from workpool.pool.handler_executor import HandlerExecutor
from workpool.pool.handler_health import HandlerHealth
from workpool.pool.handler_slots import HandlerSlots
from workpool.pool.item_requests import HeartbeatSender, ItemSender
from workpool.pool.pool_item import EndReason, OwnedItems, PoolItem
from workpool.pool.session_runner import SessionRunner
from workpool.wire.protocol import HEALTHCHECK

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.errors import ConflictError, PreconditionError, RefusedError
    from workpool.events import DeclineReason, Origin
    from workpool.handlers import Handler
    from workpool.pool.pool_context import PoolContext
    from workpool.wire.items import WorkItem

log = pool_logger(__name__)

REMEMBERED_IDS = 10_000
"""Number of ids that are remembered, to recognize redeliveries and to log a decline once."""

UNSTARTED = 3
"""After this many items in a row for which no handler was called, pollers pause between polls."""
ASIDE_MARGIN_SECONDS = 1.0
"""An item that is set aside is declined this many seconds before its redelivery."""
TYPE_CHARACTERS = 128
"""Largest number of characters of an item's type in the log."""

OfferResult = Literal["queued", "aside", "not_taken"]
"""The result of a poll whose item, if any, is offered to the dispatcher.

`queued`: the item is in the reserved place. `aside`: it waits for a slot of its handler and has no
place. `not_taken`: the poll brought no item, or the item is declined or owned already, or the pool
is paused or draining.
"""


class Dispatcher:
    """Accepts or declines the items that pollers receive, and starts a task for each accepted one.

    Args:
        context: The context of the pool.
        group: The group of the items' tasks.
        handlers: The group of the handlers' tasks.
        on_ack: Called with the final error of an ack, or with None when one was accepted.

    Attributes:
        items: The items of the pool.
        executor: Calls the handlers.
        runner: Runs the items.
        health: The failing handlers.
        idle_since: The time at which the last slot became free, on the lease clock; at first, the
            time of the start. Only valid while no slot is taken.
        on_closed: Called after an item has ended.
    """

    def __init__(
        self,
        context: PoolContext,
        group: asyncio.TaskGroup,
        handlers: asyncio.TaskGroup,
        on_ack: Callable[[RefusedError | ConflictError | PreconditionError | None], None],
    ) -> None:
        self.items = OwnedItems()
        self.on_closed: Callable[[], None] | None = None
        self._context = context
        self._admission = context.admission
        self._group = group
        settings, client, clock = context.settings, context.client, context.clock
        pauses, optional = context.renewer.pauses, context.optional
        heartbeats = HeartbeatSender(client, clock, pauses, context.observe, optional)
        claimer = Claimer(context, heartbeats, on_ack)
        sender = ItemSender(
            client,
            clock,
            settings.request_timeout,
            pauses,
            context.renewer.request_lease_check,
        )
        self.executor = HandlerExecutor(context, handlers)
        self.health = HandlerHealth(self.items.count_items)
        self.runner = SessionRunner(
            context,
            claimer,
            sender,
            self.executor,
            self.health.record_session_end,
            self._on_item_closed,
        )
        self._slots = HandlerSlots(self.items, context.plugins.handlers, settings.concurrency)
        context.queue.may_start, context.queue.start = (
            self._may_start_item_now,
            self._start_item,
        )
        self.idle_since = clock()
        self._expiry: asyncio.TimerHandle | None = None
        self._aside_seconds = context.redelivery_window_seconds - ASIDE_MARGIN_SECONDS
        # Id of a received item → whether the log says that the pool has declined the item.
        self._seen: OrderedDict[str, bool] = OrderedDict()

    @property
    def must_pause_between_polls(self) -> bool:
        """Whether pollers must pause between polls.

        True after `UNSTARTED` owned items in a row ended before a handler was called: without a
        pause, many more such items could keep the pollers busy.
        """
        return self.runner.unstarted >= UNSTARTED

    def offer_item(self, work_item: WorkItem, polled_at: float) -> OfferResult:
        """Accept, set aside or decline an item that a poll returned; return the decision.

        `polled_at` is the time when that poll was sent, on the lease clock.
        """
        if self._context.draining or self._admission.pause_reason is not None:
            # The item stays unacknowledged, so the control plane delivers it to another worker.
            return "not_taken"
        owned = self.items.find_item(work_item.id)
        # Skip the search if no expiry timer is set, because then no item is set aside.
        if owned is None and self._expiry is not None:
            owned = self._find_set_aside_item(work_item.id)
        item = PoolItem(work_item, None, self._context.start_context.copy(), self._context.clock())
        seen = self._remember_item(item.id) or item.held_before
        origin: Origin = "duplicate" if owned else "redelivered" if seen else "new"
        age = _compute_item_age_seconds(work_item) if origin == "new" else None
        self._context.observe(ItemReceived, work_item, origin, age)
        if owned is not None:
            self._update_redelivered_item(owned, polled_at)
            return "not_taken"
        item.polled_at = polled_at
        if work_item.type != HEALTHCHECK:
            item.handler = self._choose_handler(work_item)
            if item.handler is None:
                return "not_taken"
            if not self._slots.has_free_slot(item.handler):
                return self._set_item_aside(item)
        self._add_owned_item(item)
        self._context.queue.put_item(item)
        self._fill_slots()
        return "queued"

    async def adopt_handed_off_item(self, work_item: WorkItem, parents_heartbeat: str) -> None:
        """Run an item that a parent process handed off to this one."""
        handler = self._context.plugins.find_handler_for_item(work_item)
        context = self._context.start_context.copy()
        item = PoolItem(work_item, handler, context, self._context.clock())
        item.parents_heartbeat, item.held_before = parents_heartbeat, False
        self.items.add_item(item)
        await self._context.queue.reserve_place()
        self._context.queue.put_item(item)
        self._fill_slots()

    def _update_redelivered_item(self, owned: PoolItem, polled_at: float) -> None:
        """Handle the case that a poll has returned an item that this pool already owns.

        If the handler runs, the lease may be lost, and a heartbeat checks it soon. If the item
        waits for a slot, the time for which it may wait begins anew.
        """
        if owned.state == "delivered":
            owned.polled_at = polled_at
        if owned.is_handler_running:
            self._context.renewer.request_heartbeat(owned.lease)
        else:
            owned.delivered_at = self._context.clock()

    def _add_owned_item(self, item: PoolItem) -> None:
        if item.held_before:
            log.info(
                "item reclaimed",
                extra={
                    "work_id": item.id,
                    "session_id": item.session_id,
                    "direction": "gained",
                    "stage": "poll",
                },
            )
            self._context.observe(ItemReclaimed, item.work_item, "gained", "poll")
        self.items.add_item(item)

    def _set_item_aside(self, item: PoolItem) -> OfferResult:
        """Let an unacknowledged item wait up to `_aside_seconds` for a slot of its handler."""
        if self._aside_seconds <= 0:
            self._decline_item(item.work_item, "busy")
            return "not_taken"
        self._context.queue.set_item_aside(item)
        self._set_expiry_timer()
        return "aside"

    def _find_set_aside_item(self, work_id: str) -> PoolItem | None:
        return next(
            (item for item in self._context.queue.items_set_aside if item.id == work_id), None
        )

    def _may_start_item_now(self, item: PoolItem) -> bool:
        """Whether an item that was set aside may start now."""
        return (
            item.handler is not None
            and self._slots.has_free_slot(item.handler)
            and not self.items.has_agent_session(item.session_id)
            and self.health.may_claim(item.handler)
            and self._context.clock() < item.delivered_at + self._aside_seconds
        )

    def _set_expiry_timer(self) -> None:
        """Set the timer for the time when the pool must decline the oldest of the items set aside.

        That time is shortly before the redelivery of the item.
        """
        aside = self._context.queue.items_set_aside
        if aside and self._expiry is None:
            oldest = min(item.delivered_at for item in aside)
            seconds = max(0.0, oldest + self._aside_seconds - self._context.clock())
            self._expiry = asyncio.get_running_loop().call_later(
                seconds, self._decline_expired_items
            )

    def _decline_expired_items(self) -> None:
        """Decline the items that were set aside for so long that they will be redelivered soon."""
        self._expiry = None
        # A timer may fire a little early. Without these 10 ms, the item for which it was set would
        # stay, and the next timer would fire at once.
        latest = self._context.clock() - self._aside_seconds + 0.01
        for item in self._context.queue.items_set_aside:
            if item.delivered_at <= latest:
                self._context.queue.remove_item_set_aside(item)
                self._context.client.release_ack_permit()
                self._decline_item(item.work_item, "busy")
        self._set_expiry_timer()

    def _choose_handler(self, work_item: WorkItem) -> Handler | None:
        """Return the handler that the plugins choose for an item.

        Decline the item and return None if no plugin chooses a handler, or if the handler may not
        claim the item now.
        """
        handler = None
        reason: DeclineReason | None = None
        if self.items.has_agent_session(work_item.session_id):
            reason = "busy"
        else:
            try:
                handler = self._context.plugins.find_handler_for_item(work_item)
            except PluginError:
                reason = "plugin_error"
            else:
                if handler is None:
                    reason = "unwanted"
                elif not self.health.may_claim(handler):
                    reason = "busy"
        if reason is None:
            return handler
        self._decline_item(work_item, reason)
        return None

    def _decline_item(self, work_item: WorkItem, reason: DeclineReason) -> None:
        """Report that the pool leaves an item to other workers; log each item only once."""
        if not self._seen.get(work_item.id):
            self._seen[work_item.id] = True
            shown = readable(work_item.type, TYPE_CHARACTERS)
            log.info(
                "item declined", extra={"work_id": work_item.id, "type": shown, "reason": reason}
            )
        self._context.observe(ItemDeclined, work_item, reason)

    def _remember_item(self, work_id: str) -> bool:
        """Remember the id of a received item; return whether the item was received before."""
        if work_id in self._seen:
            return True
        self._seen[work_id] = False
        if len(self._seen) > REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return False

    def _fill_slots(self) -> None:
        """Start waiting items in the slots that are free."""
        queue = self._context.queue
        while not self._context.draining and (item := queue.take_startable_item()) is not None:
            self._start_item(item)

    def _start_item(self, item: PoolItem) -> None:
        """Start the task of an item that has just got a slot."""
        if self.items.find_item(item.id) is None:
            # The item was set aside, so it is not owned yet. Add it in the item's context, so that
            # the log records have the ids of its pool. The current context may belong to another
            # pool, namely if the slot was freed by the end of a session of that pool.
            item.task_context.run(self._add_owned_item, item)
        item.advance_state("slot" if item.parents_heartbeat is None else "adopted")
        item.task = self._group.create_task(
            self.runner.run_item(item), name=item.id, context=item.task_context
        )

    def _on_item_closed(self, item: PoolItem) -> None:
        """Remove an item that has ended, and give its slot to the next item or to a poller."""
        self.items.remove_item(item)
        self.health.wake_waiting_pollers()
        self.idle_since = self._context.clock()
        self._context.queue.release_slot(used_up=item.counts_towards_exit_limit)
        self._fill_slots()
        self._context.queue.give_free_places_to_pollers()
        if self.on_closed is not None:
            self.on_closed()

    def begin_drain(self) -> None:
        """Start no further item, forget the waiting ones and notify the running sessions."""
        self._context.draining = True
        self.forget_waiting_items()
        for item in self.items.copy_items():
            item.notify_waiters()
            if item.is_handler_running and item.session is not None:
                item.session.interrupt(draining=True)
                mark = self.runner.completion.mark_running_session_as_no_attempt(item)
                item.mark_task = self._group.create_task(mark, name=f"mark {item.id}")

    def forget_waiting_items(self) -> None:
        """Forget the items that wait for a slot.

        The items were not acknowledged, so the control plane delivers them to other workers.
        """
        for _ in self._context.queue.items_set_aside:
            self._context.client.release_ack_permit()
        for item in self._context.queue.forget_waiting_items():
            item.advance_state("closed")
            # `items` does not contain the items that were set aside; for these, `remove_item` would
            # raise a KeyError.
            if self.items.find_item(item.id) is item:
                self.items.remove_item(item)

    def release_all_items(self) -> None:
        """Cancel the handlers that still run, so that their items are released."""
        for item in self.items.copy_items():
            self.executor.cancel_handler(item, EndReason.DRAINED)

    def count_unfinished_items(self) -> int:
        """Return the number of items that a drain waits for: all but those of stuck handlers.

        An item whose stuck handler has just ended counts, because its completion still runs.
        """
        running = self._context.queue.running
        return running - sum(item.is_handler_running for item in self.executor.stuck)

    async def wait_for_release_marks(self, seconds: float) -> None:
        """Wait until the runs of stuck handlers are marked as not counting towards `max_attempts`.

        The wait takes `seconds` at most. Without it, a drain would abandon the items at once and
        cancel the writes of these marks.
        """
        marks = [item.mark_task for item in self.executor.stuck if item.mark_task is not None]
        if marks:
            await asyncio.wait(marks, timeout=max(0.0, seconds))

    def abandon_items(self) -> int:
        """Abandon every item that has not ended yet; return the number of these items."""
        tasks = [(item, item.task) for item in self.items.copy_items()]
        running = [(item, task) for item, task in tasks if task is not None]
        for item, task in running:
            self.runner.close_item(item)
            task.cancel()
        return len(running)


def _compute_item_age_seconds(item: WorkItem) -> float | None:
    if item.created_at is None:
        return None
    return max(0.0, (datetime.now(UTC) - item.created_at).total_seconds())
