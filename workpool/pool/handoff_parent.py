"""The parent's side of a handoff, as a handler uses it. Runs on the handlers' loop.

See workpool/docs/architecture.md, "Handing an item off".
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from workpool.errors import HandoverError, SessionEnded
from workpool.pool.handoff import Handoff
from workpool.session import HandedLease

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.pool.context import PoolContext
    from workpool.pool.lease_renewer import LeaseRenewer
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.sender import Sender

log = logging.getLogger(__name__)


@asynccontextmanager
async def hand_off(
    item: PoolItem, context: PoolContext, sender: Sender
) -> AsyncIterator[HandedLease]:
    """Hand an item off: see `Session.handover`. Used on the handlers' loop."""
    sender.check(item, by_handler=True)
    lease, renewer = item.lease, context.renewer
    item.handoff = handoff = Handoff(lease, renewer, item)
    sender.cut(item)
    renewer.start_handoff(handoff)
    try:
        yield await _opened(item, handoff, context, sender)
        renewer.call(handoff.expect_child)
        await _reaches(item, handoff, "closed")
    except asyncio.CancelledError:
        renewer.call(handoff.take_back)
        raise  # a cancelled handler must end at once; the runner calls `settle` after it
    except BaseException:
        await settle(item, handoff, renewer)
        raise
    if lease.status != "handed_off":
        sender.check(item, by_handler=False)
        raise HandoverError(item.id)


async def settle(item: PoolItem, handoff: Handoff, renewer: LeaseRenewer) -> None:
    """Wait for the end of the handoff: only then is it known which process has the item."""
    if handoff.state != "closed":
        renewer.call(handoff.take_back)
        await _reaches(item, handoff, "closed")
    if item.lease.status == "handed_off":
        log.info("handed off work_id=%s", item.id)


async def _opened(
    item: PoolItem, handoff: Handoff, context: PoolContext, sender: Sender
) -> HandedLease:
    lease = item.lease
    await _reaches(item, handoff, "open")
    if handoff.state != "open" or lease.status != "held":
        sender.check(item, by_handler=False)
        raise HandoverError(item.id)  # there was no time left for a child
    if lease.stop_requested:  # a child would be started only to be stopped
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


async def _reaches(item: PoolItem, handoff: Handoff, state: str) -> None:
    """Wait until the handoff is in this state or closed, or the lease ends, which is the bound."""
    lease, states = item.lease, {state, "closed"}
    seconds = max(0.0, lease.deadline - handoff.clock())
    await item.until(lambda: handoff.state in states or lease.status != "held", seconds)
