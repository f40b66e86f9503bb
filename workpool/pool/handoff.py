"""The parent's side of a handoff: the parent passes the lease of an item to a child process.

The pool suspends its heartbeats, the handler starts the child, and the child's first heartbeat
takes the item. That heartbeat and the pool's next one expect the same last heartbeat, so that only
one of the two succeeds. Until it is known which one succeeded, nothing else is sent for the item: a
stop or metadata request would be accepted even from the process that has lost the item.

`hand_off` and `finish_handoff` run on the handlers' loop; `HandoffRunner` runs on the renewer's.
See workpool/docs/architecture.md, "Handing an item off".
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal

from workpool.backoff import Backoff
from workpool.errors import ControlPlaneError, HandoverError, SessionEnded
from workpool.log_fields import pool_logger
from workpool.pool.call_permissions import read_or_find_item
from workpool.pool.pool_item import Handoff
from workpool.session import HandedLease
from workpool.wire.protocol import STOPPING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.pool.item_requests import ItemSender
    from workpool.pool.lease_renewer import LeaseRenewer
    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem

log = pool_logger(__name__)

READ_SECONDS, READ_CAP_SECONDS = 0.2, 2.0
"""The shortest and the longest delay between two reads of the item."""
TAKE_BACK_PART = 4
"""The pool takes the item back if no child has it when the TTL divided by this is left before the
give-up time of the lease."""


class HandoffRunner:
    """Hands one item off to a child process.

    Created on the handlers' loop, used on the event loop of the lease renewer.
    """

    def __init__(self, item: PoolItem, handoff: Handoff, renewer: LeaseRenewer) -> None:
        self._item = item
        self._lease = item.lease
        self._handoff = handoff
        self._renewer = renewer
        self._reads = Backoff(READ_SECONDS, READ_CAP_SECONDS)

    async def run_handoff(self) -> None:
        """Suspend the heartbeats until a child has the item or the pool must take the item back."""
        lease, handoff = self._lease, self._handoff
        try:
            if await self._send_heartbeat():
                lease.suspend_heartbeats()
                handoff.last_heartbeat, handoff.ttl = lease.expected, round(lease.ttl)
                self._set_handoff_state("open")
                await self._wait_for_child()
                await self._send_heartbeat()
        finally:
            self._set_handoff_state("closed")

    async def _send_heartbeat(self) -> bool:
        """Send a heartbeat, or wait for the one in flight; return whether the lease is held."""
        lease, changed = self._lease, self._handoff.changed
        self._renewer.send_handoff_heartbeat(lease)
        while not (
            lease.is_over or (lease.is_freshly_extended and lease.due_at > self._renewer.clock())
        ):
            changed.clear()
            # `changed` is also set by the end of the lease, so this wait needs no time limit.
            await changed.wait()
        return not lease.is_over

    async def _wait_for_child(self) -> None:
        lease, handoff, clock = self._lease, self._handoff, self._renewer.clock
        # Stop waiting while enough time is left to send the heartbeat by which this pool takes the
        # item back.
        until = lease.give_up_at - lease.ttl / TAKE_BACK_PART
        while not (handoff.take_back_requested or lease.is_over) and (left := until - clock()) > 0:
            handoff.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    min(left, self._reads.next_delay()) if handoff.child_expected else left
                ):
                    await handoff.changed.wait()
            if handoff.child_expected and not await self._child_may_still_take_item():
                return

    async def _child_may_still_take_item(self) -> bool:
        """Read the item, and return whether a child process may still take it over.

        Ends the lease if the child, or another worker, has the item.
        """
        lease, client = self._lease, self._renewer.client
        try:
            timeout = self._renewer.request_timeout
            item = await read_or_find_item(client, self._renewer.optional, lease.item.id, timeout)
        except ControlPlaneError:
            return True
        if item is None:
            return True
        status = lease.find_status_in_read_item(item)
        if status != "held":
            lease.end_lease(status, "taken")
            self._renewer.report_lease_change(self._item)
        # If an operator asks to stop the item, do not wait for the child, which may never start.
        return status == "held" and item.state != STOPPING

    def _set_handoff_state(self, state: Literal["open", "closed"]) -> None:
        self._handoff.state = state
        self._renewer.report_lease_change(self._item)


@asynccontextmanager
async def hand_off(
    item: PoolItem, context: PoolContext, sender: ItemSender
) -> AsyncIterator[HandedLease]:
    """Hand an item off; see `Session.handover`. Used on the handlers' loop."""
    sender.check_requests_allowed(item, by_handler=True)
    lease, renewer = item.lease, context.renewer
    item.handoff = handoff = Handoff()
    sender.abort_waits_for_answers(item)
    renewer.start_handoff_task(HandoffRunner(item, handoff, renewer).run_handoff, "handoff")
    try:
        yield await _wait_until_handoff_opens(item, handoff, context, sender)
        renewer.call_on_renewer_loop(handoff.record_child_started)
        await _wait_for_handoff_state(item, handoff, "closed", renewer.clock)
    except asyncio.CancelledError:
        renewer.call_on_renewer_loop(handoff.request_take_back)
        # Do not wait for the end of the handoff, since a cancelled handler must end at once. The
        # session runner waits for it in `finish_handoff`.
        raise
    except BaseException:
        await finish_handoff(item, handoff, renewer)
        raise
    if lease.status != "handed_off":
        sender.check_requests_allowed(item, by_handler=False)
        raise HandoverError(item.id)


async def finish_handoff(item: PoolItem, handoff: Handoff, renewer: LeaseRenewer) -> None:
    """Take the item back unless a child has it, and wait until the handoff is closed."""
    if handoff.state != "closed":
        renewer.call_on_renewer_loop(handoff.request_take_back)
        await _wait_for_handoff_state(item, handoff, "closed", renewer.clock)
    if item.lease.status == "handed_off":
        log.info("handed off", extra={"work_id": item.id})


async def _wait_until_handoff_opens(
    item: PoolItem, handoff: Handoff, context: PoolContext, sender: ItemSender
) -> HandedLease:
    lease = item.lease
    await _wait_for_handoff_state(item, handoff, "open", context.clock)
    if handoff.state != "open" or lease.status != "held":
        sender.check_requests_allowed(item, by_handler=False)
        # A child would not have enough time to take the item over before the end of the lease.
        raise HandoverError(item.id)
    if lease.stop_requested:
        # Do not start a child that would have to stop at once.
        raise SessionEnded(item.id)
    settings = context.settings
    return HandedLease(
        work_id=item.id,
        environment_id=item.work_item.environment_id,
        last_heartbeat=handoff.last_heartbeat,
        ttl=handoff.ttl,
        base_url=settings.base_url,
        dialect=settings.dialect,
        session_id=item.session_id,
        item_token=item.work_item.sessions_token,
    )


async def _wait_for_handoff_state(
    item: PoolItem, handoff: Handoff, state: str, clock: Clock
) -> None:
    """Wait until the handoff's state is `state` or "closed", or until the item's lease ends."""
    lease, states = item.lease, {state, "closed"}
    seconds = max(0.0, lease.deadline - clock())
    await item.wait_until(lambda: handoff.state in states or lease.status != "held", seconds)
