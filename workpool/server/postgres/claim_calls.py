"""Polls on PostgreSQL: deliver items, withdraw deliveries, and end expired leases.

A claim takes the oldest item that no other transaction is taking, in one statement. Leases end
without a leader: each node looks for ended leases before some of its claims, and every call on an
item sees the end of its lease.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server import state_machine
from workpool.server.postgres.database_calls import (
    CLOCK,
    NEXT_VERSION,
    RECORD,
    DatabaseCalls,
    ItemChange,
    make_change_that_ends_lease,
)
from workpool.server.postgres.database_errors import UnavailableError
from workpool.server.postgres.item_cache import ItemCache
from workpool.server.postgres.notifications import make_work_topic
from workpool.server.postgres.row_codec import ITEM_COLUMNS, ITEM_FIELDS, item_from_row
from workpool.server.timestamps import MILLISECOND, SECOND
from workpool.wire.protocol import (
    ACK_LEASE_SECONDS,
    QUEUED,
    TTL_MIN_SECONDS,
    WORKERS_POLLING_WINDOW_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server.postgres.connection_pool import Connection
    from workpool.server.queue.long_polls import Poll
    from workpool.server.stored_item import Item

LAPSE_CHECK_SECONDS: Final = 0.25
"""Shortest time between two looks of a node for ended leases of an environment."""
LEASE_MIN_SECONDS: Final = min(ACK_LEASE_SECONDS, TTL_MIN_SECONDS)
"""Shortest lease."""
LAPSES_MAX: Final = 100
"""Largest number of leases that lapse in one transaction."""
POLLER_SECONDS: Final = 5.0
"""Shortest time between two writes of the time of a worker's last poll."""
_WINDOW: Final = WORKERS_POLLING_WINDOW_SECONDS * SECOND

_CLAIM: Final = f"""
WITH {CLOCK.format("$4")}, picked AS MATERIALIZED (
    SELECT i.id FROM items AS i, clock
    WHERE i.environment_id = $1 AND i.state = 'queued'
        AND (i.delivered_at IS NULL OR i.delivered_at <= clock.now - $3::bigint)
    ORDER BY i.id LIMIT 1 FOR UPDATE OF i SKIP LOCKED
), claimed AS (
    UPDATE items AS i SET delivered_at = clock.now, holder = $2, version = {NEXT_VERSION}
    FROM picked, clock WHERE i.environment_id = $1 AND i.id = picked.id
    RETURNING {ITEM_COLUMNS}, i.version
){{}}
SELECT {ITEM_COLUMNS}, i.version, clock.now,
    CASE WHEN i.id IS NULL THEN (
        SELECT min(delivered_at) FROM items WHERE environment_id = $1 AND state = 'queued'
    ) END
FROM clock LEFT JOIN claimed AS i ON true
"""
_CLAIMS: Final = {
    False: _CLAIM.format(""),
    True: _CLAIM.format(
        f""", recorded AS ({
            RECORD.format(
                "SELECT clock.now, claimed.id, 'delivered', $2, 'queued', NULL, NULL "
                "FROM claimed, clock"
            )
        })"""
    ),
}
"""The claim of an item, by whether there is a history."""

_NEXT_LAPSE: Final = """
SELECT min(i.lease_end) - coalesce($2::bigint, workpool_now()) FROM items AS i
WHERE {} AND i.state IN ('starting', 'active', 'stopping')
"""
_ENDED: Final = f"""
SELECT {ITEM_COLUMNS}, i.version FROM items AS i
WHERE {{}} AND i.state IN ('starting', 'active', 'stopping')
    AND i.lease_end <= coalesce($2::bigint, workpool_now())
ORDER BY i.environment_id, i.lease_end, i.id LIMIT {LAPSES_MAX} FOR UPDATE OF i SKIP LOCKED
"""
_HERE: Final = "i.environment_id = $1"
_EVERYWHERE: Final = "$1::text IS NULL"
_POLLED: Final = """
INSERT INTO pollers AS p (environment_id, worker_id, seen_at)
VALUES ($1, $2, coalesce($3::bigint, workpool_now()))
ON CONFLICT (environment_id, worker_id)
DO UPDATE SET seen_at = greatest(p.seen_at, excluded.seen_at)
"""
_FORGET_POLLERS: Final = """
DELETE FROM pollers WHERE seen_at <= coalesce($1::bigint, workpool_now()) - $2::bigint
"""


class ClaimOutcome(NamedTuple):
    """The result of one claim: the delivered item, or the time until an item may be claimable.

    Attributes:
        item: The delivered item; None: no item was claimable.
        version: The version of the item's row.
        due_seconds: The time until an item that was delivered to another poll becomes claimable;
            None: there is no such item.
    """

    item: Item | None
    version: int
    due_seconds: float | None


class ClaimCalls(DatabaseCalls):
    """The calls that deliver items to polls, and the calls that end expired leases."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # The earliest time of the next check for expired leases, by environment id. The key None is
        # for the check of all environments.
        self._next_look: dict[str | None, float] = {}
        self._known = ItemCache()
        self._polled: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._closing = False

    async def long_poll(
        self, environment_id: str, poll: Poll, gone: Callable[[], bool]
    ) -> Item | None:
        """Deliver an item to a poll, which waits up to `block_ms`; return None if no item came."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + poll.block_ms / 1000
        topic = make_work_topic(environment_id)
        await self._record_poll_time(environment_id, poll.worker_id)
        announced = True
        while not gone():
            seen = self._hub.get_change_count()
            delivery = await self._claim_or_withdraw_delivery(environment_id, poll)
            item = delivery.item
            if item is not None:
                if not announced:
                    # The notification of this item was lost. The lost notification may have
                    # announced further items, so wake another poll too.
                    self._hub.wake_waiting_calls(topic)
                if not gone():
                    return item
                await self._withdraw_delivery(item, delivery.version)
                return None
            remaining = deadline - loop.time()
            if remaining <= 0 or self._closing:
                return None
            seconds = _compute_poll_wait_seconds(remaining, poll, delivery.due_seconds)
            announced = await self._hub.wait_for_topic_change(topic, seen, seconds)
            # The time of this poll is over, so it does not claim again: the next poll of the worker
            # begins with a claim.
            if not announced and loop.time() >= deadline:
                return None
        # The client of this poll has disconnected, so another poll must be woken for the item.
        self._hub.wake_waiting_calls(topic)
        return None

    async def _claim_or_withdraw_delivery(self, environment_id: str, poll: Poll) -> ClaimOutcome:
        """Claim an item; if the call is cancelled meanwhile, withdraw the delivery."""
        claim = asyncio.get_running_loop().create_task(self._claim_item(environment_id, poll))
        try:
            return await asyncio.shield(claim)
        except asyncio.CancelledError:
            # Wait for the end of the claim, in order to withdraw the delivery of the item that it
            # returns. The time limits of the claim's SQL statements limit this wait, and a second
            # cancellation ends it.
            with suppress(UnavailableError):
                delivery = await claim
                if delivery.item is not None:
                    await self._withdraw_delivery(delivery.item, delivery.version)
            raise

    async def _claim_item(self, environment_id: str, poll: Poll) -> ClaimOutcome:
        await self._end_due_leases(environment_id)
        reclaim = poll.reclaim_older_than_ms * MILLISECOND
        row = await self._pool.fetchrow(
            _CLAIMS[self._has_history],
            environment_id,
            poll.worker_id,
            reclaim,
            self._read_test_clock(),
        )
        version, now, first_delivered = row[len(ITEM_FIELDS) :]
        if row[0] is not None:
            item = item_from_row(row)
            self._known.put(item, version, now)
            return ClaimOutcome(item, version, None)
        due = None if first_delivered is None else (first_delivered + reclaim - now) / SECOND
        return ClaimOutcome(None, 0, due)

    async def _withdraw_delivery(self, item: Item, version: int) -> None:
        """Undo a delivery, because the client disconnected before it got the answer."""
        self._known.pop(item.environment_id, item.id)
        withdrawn = state_machine.withdraw_delivery(item)
        change = ItemChange(withdrawn, "withdrawn", item.holder, await self._current_time())
        if await self._write_item(self._pool, item, version, [change]) is not None:
            self._hub.announce_topic_changes(make_work_topic(item.environment_id))

    async def _end_due_leases(self, environment_id: str | None) -> int:
        """End the expired leases of one environment or of all; return the number of ended leases.

        `environment_id`: None: all environments.

        A check reads all leases, so the next check is as late as possible: at the end of the first
        of these leases, or at the earliest end of a lease that begins or is extended after this
        check.
        """
        now = asyncio.get_running_loop().time()
        if now < self._next_look.get(environment_id, now) and self._now is None:
            return 0
        statement = _NEXT_LAPSE.format(_EVERYWHERE if environment_id is None else _HERE)
        first = await self._pool.fetchval(statement, environment_id, self._read_test_clock())
        seconds = LEASE_MIN_SECONDS if first is None else first / SECOND
        self._next_look[environment_id] = now + min(
            max(seconds, LAPSE_CHECK_SECONDS), LEASE_MIN_SECONDS
        )
        ended = first is not None and first <= 0
        return await self.end_leases(environment_id) if ended else 0

    async def end_batch_of_expired_leases(self) -> int:
        """End at most `LAPSES_MAX` expired leases of all environments, and return their number.

        If this call ended any leases, more may have expired, so the next call checks at once.
        """
        lapsed = await self._end_due_leases(None)
        if lapsed:
            self._next_look.pop(None)
        return lapsed

    async def end_leases(self, environment_id: str | None = None) -> int:
        """End at most `LAPSES_MAX` expired leases of an environment, and return their number.

        If `environment_id` is None, this call ends leases of all environments. Leases whose
        rows are locked are skipped.
        """
        statement = _ENDED.format(_EVERYWHERE if environment_id is None else _HERE)

        async def end_leases_of_batch() -> list[Item]:
            async with self._pool.transaction() as connection:
                rows = await connection.fetch(statement, environment_id, self._read_test_clock())
                return [
                    await self._end_lease(connection, item_from_row(row), row[-1]) for row in rows
                ]

        lapsed = await self._pool.retry_colliding_call(end_leases_of_batch)
        queued = [item.environment_id for item in lapsed if item.state == QUEUED]
        for each in sorted(set(queued)):
            self._hub.announce_topic_changes(make_work_topic(each), queued.count(each))
        return len(lapsed)

    async def _end_lease(self, connection: Connection, stored: Item, version: int) -> Item:
        change = make_change_that_ends_lease(stored)
        await self._write_item(connection, stored, version, [change])
        return change.item

    async def delete_idle_pollers(self) -> int:
        """Delete all records of workers that stopped polling; return 0: no such record is left."""
        await self._pool.execute(_FORGET_POLLERS, self._read_test_clock(), _WINDOW)
        return 0

    async def _record_poll_time(self, environment_id: str, worker_id: str | None) -> None:
        """Record the time of a worker's poll, at most once in `POLLER_SECONDS`."""
        if worker_id is None:
            return
        now = asyncio.get_running_loop().time()
        while self._polled and next(iter(self._polled.values())) <= now - POLLER_SECONDS:
            self._polled.popitem(last=False)
        if (environment_id, worker_id) not in self._polled or self._now is not None:
            self._polled[environment_id, worker_id] = now
            await self._pool.execute(_POLLED, environment_id, worker_id, self._read_test_clock())


def _compute_poll_wait_seconds(remaining: float, poll: Poll, due_seconds: float | None) -> float:
    """Return the seconds after which a waiting poll claims again if nothing wakes it earlier.

    If another poll receives an item meanwhile and the other worker sends no ack, the item becomes
    claimable again after `reclaim_older_than_ms` at the earliest, without a notification.
    """
    limits = [remaining, max(poll.reclaim_older_than_ms / 1000, 1.0)]
    if due_seconds is not None:
        limits.append(max(due_seconds, 0.001))
    return min(limits)
