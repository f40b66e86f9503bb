"""The calls that a running handler may make for its item, as the backend of its `Session`."""

from __future__ import annotations

import asyncio
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from workpool.pool.handoff import hand_off
from workpool.pool.item_requests import CALLS_PER_SESSION, SendOptions
from workpool.wire.http.call_options import CallOptions, Priority

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from workpool.pool.item_requests import ItemSender
    from workpool.pool.pool_context import PoolContext
    from workpool.pool.pool_item import PoolItem
    from workpool.session import HandedLease
    from workpool.wire.events.session_events import SessionEvents
    from workpool.wire.items import WorkItem

T = TypeVar("T")

EVENTS_SECONDS = 60.0
"""Seconds for which a handler's `events.send` is retried: the default TTL of a lease."""
UPDATE_SECONDS = 30.0
"""Seconds for which a handler's `update_metadata` is retried."""


@dataclass(slots=True)
class PoolSessionBackend:
    """The calls of a `Session` for its item: progress, metadata, events and handoff.

    Lives on the handlers' loop.
    """

    _item: PoolItem
    _context: PoolContext
    _sender: ItemSender
    _places: asyncio.Semaphore | None = None

    @property
    def lease_remaining(self) -> float:
        """Seconds until another worker may get the item; the handler is cancelled before that."""
        return self._item.lease.remaining_seconds(self._context.clock())

    @property
    def deadline(self) -> float | None:
        """The loop time at which the handler will be cancelled; None if no limit is known."""
        deadline = min(self._item.cancelled_at, self._context.drain_deadline())
        return None if deadline == math.inf else deadline

    def progress(self) -> None:
        """Record the time of the handler's progress. May be called on any thread."""
        self._item.progressed_at = self._context.clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Keep the time of a `with` block from counting towards `stall_timeout`.

        May be used on any thread.
        """
        waits = self._item.waits
        waits.append(None)
        try:
            yield
        finally:
            # Set the time of the last progress before the wait is removed: a check between the two
            # would count the whole wait as time without progress.
            self.progress()
            waits.pop()

    def check(self) -> None:
        """Raise an error if the handler must not send requests for the item anymore."""
        self._sender.check_requests_allowed(self._item, by_handler=True)

    def hand_off_item(self) -> AbstractAsyncContextManager[HandedLease]:
        """Hand the item off to a child process."""
        return hand_off(self._item, self._context, self._sender)

    async def update_metadata(self, patch: Mapping[str, str | None]) -> WorkItem:
        """Write metadata of the item, with retries for `UPDATE_SECONDS`."""
        client, work_id = self._context.client, self._item.id
        optional = self._context.optional
        written = await optional.send_optional_call(
            "update",
            lambda: self._send_request_of_handler(
                lambda options, seconds: client.update_metadata(
                    work_id, patch, timeout=seconds, options=options
                ),
                UPDATE_SECONDS,
                partial(optional.check_permitted, "update"),
            ),
        )
        self.progress()
        return written

    def events(self) -> SessionEvents:
        """Return the events of the item's session."""
        item = self._item.work_item
        return self._context.client.events(item.session_id, token=item.sessions_token, guard=self)

    async def run_write_call(self, call: Callable[[CallOptions], Awaitable[T]]) -> T:
        """Make a call that writes to the session, with retries for `EVENTS_SECONDS`."""
        sent = await self._send_request_of_handler(lambda options, _: call(options), EVENTS_SECONDS)
        self.progress()
        return sent

    async def await_guarded_call(
        self, call: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Await a call that reads the session, while the lease is held and the handler runs."""
        return await self._sender.await_call_while_leased(self._item, call, seconds)

    async def _send_request_of_handler(
        self,
        call: Callable[[CallOptions, float], Awaitable[T]],
        seconds: float,
        before_bytes: Callable[[], None] | None = None,
    ) -> T:
        # Without this limit, a handler with many calls at once could use all connections.
        self._places = self._places or asyncio.Semaphore(CALLS_PER_SESSION)
        async with self._places:
            options = SendOptions(Priority.HANDLER, by_handler=True, seconds=seconds)
            return await self._sender.send_with_retries(self._item, call, options, before_bytes)
