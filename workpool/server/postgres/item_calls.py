"""The calls on one item: ack, heartbeat, stop, update and get.

The rules are those of `state_machine`. A change of an item whose row this node knows is one
statement (`item_cache`); for any other, the row is read first. The heartbeat of a held lease,
which is by far the most frequent call, is one statement on every node. It repeats one of the rules,
and a test compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workpool.server import state_machine
from workpool.server.answer_limits import check_metadata_limits
from workpool.server.api_errors import APIError
from workpool.server.history import get_record_op_of_heartbeat
from workpool.server.postgres.claim_calls import ClaimCalls
from workpool.server.postgres.database_calls import (
    CLOCK,
    NEXT_VERSION,
    RECORD,
    ItemChange,
    make_change_that_ends_lease,
)
from workpool.server.postgres.item_cache import CachedItem, change_cached_item
from workpool.server.postgres.notifications import make_work_topic
from workpool.server.postgres.row_codec import (
    ITEM_COLUMNS,
    ITEM_FIELDS,
    has_id_format,
    item_from_row,
)
from workpool.server.timestamps import parse_heartbeat_time
from workpool.wire.protocol import (
    QUEUED,
    STOPPING,
    TTL_DEFAULT_SECONDS,
    TTL_MAX_SECONDS,
    TTL_MIN_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from workpool.server.history import Kind
    from workpool.server.postgres.connection_pool import Connection
    from workpool.server.stored_item import Item

LOCK_ITEM: Final = "SELECT FROM items WHERE environment_id = $1 AND id = $2 FOR UPDATE"
_CONFLICT: Final = RECORD.format(
    "VALUES (coalesce($1::bigint, workpool_now()), $2, 'conflict', $3, $4, $5, $6)"
)
_HEARTBEAT: Final = f"""
WITH {CLOCK.format("$5")}, changed AS (
    UPDATE items AS i SET
        heartbeat_at = greatest(clock.now, i.heartbeat_at + 1),
        lease_end = clock.now + $4::bigint * 1000000,
        ttl_seconds = $4,
        version = {NEXT_VERSION}
    FROM clock
    WHERE i.environment_id = $1 AND i.id = $2 AND i.state IN ('active', 'stopping')
        AND i.beaten AND i.heartbeat_at = $3::bigint AND i.lease_end > clock.now
    RETURNING {ITEM_COLUMNS}, i.version
){{}}
SELECT {ITEM_COLUMNS}, i.version, clock.now FROM changed AS i, clock
"""
_HEARTBEATS: Final = {
    False: _HEARTBEAT.format(""),
    True: _HEARTBEAT.format(
        f""", recorded AS ({
            RECORD.format(
                "SELECT clock.now, changed.id, 'heartbeat', $6, changed.state, changed.lease_end, "
                "NULL FROM changed, clock"
            )
        })"""
    ),
}
"""The heartbeat of a held lease, by whether there is a history."""


class ItemCalls(ClaimCalls):
    """The calls that read or change one item."""

    async def get_item(self, environment_id: str, work_id: str) -> Item:
        """Return an item; raises a 404 for an unknown id."""
        stored, item, _, _ = await self._read_item(self._pool, environment_id, work_id)
        if item is not stored:
            await self.end_leases(environment_id)
        return item

    async def ack_item(
        self, environment_id: str, work_id: str, worker_id: str | None = None
    ) -> Item:
        """Acknowledge an item."""

        def compute_change_by_ack(item: Item, now: int) -> ItemChange:
            acked = state_machine.ack_item(item, worker_id, now)
            return ItemChange(acked, "acked", worker_id or acked.holder, now)

        return await self._change_item(
            environment_id, work_id, compute_change_by_ack, worker_id, "ack"
        )

    async def heartbeat(
        self,
        environment_id: str,
        work_id: str,
        expected: str | None = None,
        ttl_seconds: int = TTL_DEFAULT_SECONDS,
        worker_id: str | None = None,
        *,
        compare_on_stop: bool = True,
    ) -> Item:
        """Extend the lease of an item, if `state_machine.extend_lease` allows the heartbeat."""
        extended = await self._extend_lease(
            environment_id, work_id, expected, ttl_seconds, worker_id
        )
        if extended is not None:
            return extended

        def compute_change_by_heartbeat(item: Item, now: int) -> ItemChange:
            beaten = state_machine.extend_lease(
                item, expected, ttl_seconds, now, compare_on_stop=compare_on_stop
            )
            return ItemChange(
                beaten, "heartbeat", worker_id, now, get_record_op_of_heartbeat(expected)
            )

        return await self._change_item(
            environment_id, work_id, compute_change_by_heartbeat, worker_id, "heartbeat"
        )

    async def _extend_lease(
        self,
        environment_id: str,
        work_id: str,
        expected: str | None,
        ttl_seconds: int,
        worker_id: str | None,
    ) -> Item | None:
        """Extend a lease in one statement; return None if the last heartbeat is not `expected`."""
        last = None if expected is None else parse_heartbeat_time(expected)
        if last is None or not has_id_format(work_id):
            return None
        ttl_seconds = min(max(ttl_seconds, TTL_MIN_SECONDS), TTL_MAX_SECONDS)
        values = [environment_id, work_id, last, ttl_seconds, self._read_test_clock()]
        if self._has_history:
            values.append(worker_id)
        row = await self._pool.fetchrow(_HEARTBEATS[self._has_history], *values)
        if row is None:
            return None
        item = item_from_row(row)
        self._known.put(item, *row[len(ITEM_FIELDS) :])
        return item

    async def stop_item(
        self,
        environment_id: str,
        work_id: str,
        worker_id: str | None = None,
        *,
        force: bool = False,
        refused: frozenset[tuple[bool, str]] = frozenset(),
    ) -> Item:
        """Stop an item. Raises a 409 if the pair (`force`, the item's state) is in `refused`."""

        def compute_change_by_stop(item: Item, now: int) -> ItemChange:
            return make_change_that_stops_item(item, worker_id, now, force=force, refused=refused)

        return await self._change_item(
            environment_id, work_id, compute_change_by_stop, worker_id, "stop"
        )

    async def update_metadata(
        self,
        environment_id: str,
        work_id: str,
        patch: Mapping[str, str | None],
        worker_id: str | None = None,
    ) -> Item:
        """Merge a patch into an item's metadata."""

        def compute_change_by_metadata_update(item: Item, now: int) -> ItemChange:
            merged = state_machine.merge_metadata(item, patch)
            check_metadata_limits(merged.metadata)
            return ItemChange(merged, "metadata", worker_id, now)

        return await self._change_item(
            environment_id, work_id, compute_change_by_metadata_update, worker_id
        )

    async def _change_item(
        self,
        environment_id: str,
        work_id: str,
        decide: Callable[[Item, int], ItemChange],
        worker_id: str | None,
        op: str | None = None,
    ) -> Item:
        """Apply the change that `decide` returns for the item and the current time.

        `op`: the name of the call in the record of a conflict; None: conflicts are not recorded.
        """
        changed = None
        known = self._known.pop(environment_id, work_id)
        if known is not None:
            changed = await change_cached_item(
                self._pool,
                known,
                decide,
                now=self._read_test_clock(),
                has_history=self._has_history,
            )
        if changed is None:
            changed = await self._read_and_change_item(
                environment_id, work_id, decide, worker_id, op
            )
        self._known.put(*changed)
        return changed.item

    async def _read_and_change_item(
        self,
        environment_id: str,
        work_id: str,
        decide: Callable[[Item, int], ItemChange],
        worker_id: str | None,
        op: str | None,
    ) -> CachedItem:
        async def attempt_to_change_item(connection: Connection) -> CachedItem | APIError | None:
            stored, item, version, now = await self._read_item(connection, environment_id, work_id)
            try:
                change = decide(item, now)
            except APIError as refusal:
                # The record is written on this connection: calls that each hold one and wait for a
                # second one would wait for each other. The error is returned, because an exception
                # would roll back the transaction with the record.
                await self._write_conflict_record(connection, item, worker_id, op)
                return refusal
            changes = [] if item is stored else [make_change_that_ends_lease(stored)]
            if change.item is not item:
                changes.append(change)
            if not changes:
                return CachedItem(item, version, now)
            written = await self._write_item(connection, stored, version, changes)
            return None if written is None else CachedItem(change.item, written, now)

        changed: CachedItem | APIError = await self._retry_with_row_lock(
            attempt_to_change_item, LOCK_ITEM, environment_id, work_id
        )
        if isinstance(changed, APIError):
            raise changed
        if changed.item.state == QUEUED:
            # The change may have ended the item's lease. Then the item is claimable: wake a poll.
            self._hub.announce_topic_changes(make_work_topic(environment_id))
        return changed

    async def _write_conflict_record(
        self, connection: Connection, item: Item, worker_id: str | None, op: str | None
    ) -> None:
        if op is not None and self._has_history:
            await connection.execute(
                _CONFLICT,
                self._read_test_clock(),
                item.id,
                worker_id,
                item.state,
                item.lease_end,
                op,
            )


def make_change_that_stops_item(
    item: Item,
    worker_id: str | None,
    now: int,
    *,
    force: bool = False,
    refused: frozenset[tuple[bool, str]] = frozenset(),
) -> ItemChange:
    """Return the change that stops an item; raises a 409 if the dialect refuses the stop."""
    if (force, item.state) in refused:
        raise APIError(409, f"the item is {item.state}")
    stopped = state_machine.stop_item(item, now, force=force)
    kind: Kind = "stop_requested" if stopped.state == STOPPING else "stopped"
    return ItemChange(stopped, kind, worker_id, now)
