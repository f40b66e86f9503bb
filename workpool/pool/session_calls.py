"""The calls behind `Session`: what a handler may send for its item, checked by the sender.

See workpool/docs/architecture.md, "Sending for an item".
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from workpool.pool.handoff_parent import hand_off
from workpool.pool.sender import CALLS_PER_SESSION, SendOptions
from workpool.wire.http.call_options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from workpool.pool.context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.sender import Sender
    from workpool.session import HandedLease
    from workpool.wire.events.session_events import SessionEvents
    from workpool.wire.items import WorkItem

T = TypeVar("T")

EVENTS_SECONDS = 60.0
"""How long a handler's `events.send` is retried: the default TTL of a lease."""
UPDATE_SECONDS = 30.0
"""How long a handler's `update_metadata` is retried."""


class SessionCalls:
    """The calls of one session. Lives on the handlers' loop."""

    __slots__ = ("_context", "_item", "_places", "_sender")

    def __init__(self, item: PoolItem, context: PoolContext, sender: Sender) -> None:
        self._item = item
        self._context = context
        self._sender = sender
        self._places: asyncio.Semaphore | None = None

    @property
    def remaining(self) -> float:
        """Seconds until the lease must be considered lost."""
        return self._item.lease.remaining(self._context.clock())

    def check(self) -> None:
        """Raise unless the handler may send something for the item."""
        self._sender.check(self._item, by_handler=True)

    def hand_over(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item off to a child process."""
        return hand_off(self._item, self._context, self._sender)

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata, retried for `UPDATE_SECONDS`."""
        client, work_id = self._context.client, self._item.id
        optional = self._context.optional
        return await optional.make(
            "update",
            lambda: self._send(
                lambda options, seconds: client.update_metadata(
                    work_id, patch, timeout=seconds, options=options
                ),
                UPDATE_SECONDS,
                partial(optional.check, "update"),
            ),
        )

    def events(self) -> SessionEvents:
        """The events of the item's session."""
        item = self._item.work_item
        return self._context.client.events(item.session_id, token=item.sessions_token, guard=self)

    async def carry(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Send something to the session, retried for `EVENTS_SECONDS`."""
        return await self._send(lambda options, _: call(options), EVENTS_SECONDS)

    async def within(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Await a read of the session while the item is the handler's."""
        return await self._sender.read(self._item, call, seconds)

    async def _send(
        self,
        call: Callable[[CallOptions, float], Awaitable[T]],
        seconds: float,
        before_bytes: Callable[[], None] | None = None,
    ) -> T:
        # One handler with many calls must not take the connections of the others.
        self._places = self._places or asyncio.Semaphore(CALLS_PER_SESSION)
        async with self._places:
            request = SendOptions(
                Priority.HANDLER, by_handler=True, seconds=seconds, before_bytes=before_bytes
            )
            return await self._sender.send(self._item, call, request)
