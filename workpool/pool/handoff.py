"""Handing an item off to a child process: the part that runs on the renewer's loop.

Our heartbeats are suspended, the handler starts the child, and the child's first heartbeat takes
the item. That heartbeat and our next one expect the same last heartbeat, ours, so that only one of
the two succeeds. Until it is known which one, nothing else is sent for the item: stops and metadata
carry no precondition on the wire.
See workpool/docs/architecture.md, "Handing an item off".
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from workpool.backoff import Backoff
from workpool.errors import ControlPlaneError
from workpool.pool.optional_calls import read_item
from workpool.wire.protocol import STOPPING

if TYPE_CHECKING:
    from workpool.pool.lease import Lease
    from workpool.pool.lease_renewer import LeaseRenewer
    from workpool.pool.pool_item import PoolItem

READ_SECONDS, READ_CAP_SECONDS = 0.2, 2.0
"""The shortest and the longest delay between two reads of the item."""
TAKE_BACK_PART = 4
"""An item without a child is taken back this part of the TTL before its lease is given up."""


class Handoff:
    """One attempt to hand an item off. Created on the handlers' loop, run on the renewer's.

    Attributes:
        state: asked; open: our heartbeats are suspended; closed: the lease is ours again, or over.
            Written on the renewer's loop only, like the two below.
        last_heartbeat: What the child's first heartbeat must expect, once open.
        ttl: Seconds that our last heartbeat was granted, once open.
    """

    def __init__(self, lease: Lease, renewer: LeaseRenewer, item: PoolItem) -> None:
        self.state: Literal["asked", "open", "closed"] = "asked"
        self.last_heartbeat = ""
        self.ttl = 0
        self._lease = lease
        self._renewer = renewer
        self._item = item
        self._child_expected = self._taken_back = False
        self.clock = renewer.clock
        self._reads = Backoff(READ_SECONDS, READ_CAP_SECONDS)
        self._changed = asyncio.Event()  # waited for and set on the renewer's loop

    # Called on the renewer's loop.

    def wake(self) -> None:
        """Record that a heartbeat was answered or that the lease has ended."""
        self._changed.set()

    def expect_child(self) -> None:
        """Record that the child was started."""
        self._child_expected = True
        self._changed.set()

    def take_back(self) -> None:
        """Wait no longer for a child: take the item back."""
        self._taken_back = True
        self._changed.set()

    async def run(self) -> None:
        """Send nothing until a child has the item or the pool must take it back."""
        lease = self._lease
        try:
            if await self._heartbeat():
                lease.suspend()
                self.last_heartbeat, self.ttl = lease.expected, round(lease.ttl)
                self._turn("open")
                await self._wait_for_child()
                await self._heartbeat()
        finally:
            self._turn("closed")

    async def _heartbeat(self) -> bool:
        """Send a heartbeat, or wait for the one under way; return whether the lease is held."""
        lease = self._lease
        self._renewer.heartbeat_now(lease)
        while not (lease.over or (lease.settled and lease.due_at > self.clock())):
            self._changed.clear()
            await self._changed.wait()  # bounded by the end of the lease
        return not lease.over

    async def _wait_for_child(self) -> None:
        lease, clock = self._lease, self.clock
        # Leaves time for the heartbeat that takes the item back.
        until = lease.give_up_at - lease.ttl / TAKE_BACK_PART
        while not (self._taken_back or lease.over) and (left := until - clock()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    min(left, self._reads.next()) if self._child_expected else left
                ):
                    await self._changed.wait()
            if self._child_expected and not await self._child_missing():
                return

    async def _child_missing(self) -> bool:
        """Read the item; return whether to wait on for the child."""
        lease, client = self._lease, self._renewer.client
        try:
            timeout = self._renewer.request_timeout
            item = await read_item(client, self._renewer.optional, lease.item.id, timeout)
        except ControlPlaneError:
            return True
        if item is None:
            return True
        status = lease.status_by(item)
        if status != "held":
            lease.end(status, confirmed=status == "lost")
            self._renewer.report(self._item)
        # A request to stop must not wait for a child that may never start.
        return status == "held" and item.state != STOPPING

    def _turn(self, state: Literal["open", "closed"]) -> None:
        self.state = state
        self._renewer.report(self._item)
