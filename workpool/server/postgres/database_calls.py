"""The base class of all calls on the database: the clock, retries, and changes of one item.

Most calls read a row, decide with the rules of the other engines, and write on the condition that
the row still has the version that was read: two statements, without a lock in between. After some
collisions the row is locked first. Every transaction locks in this order: a session, its items, a
counter.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from workpool.server import state_machine
from workpool.server.api_errors import APIError
from workpool.server.postgres.database_errors import RetryableError
from workpool.server.postgres.row_codec import ITEM_COLUMNS, has_id_format, item_from_row, to_json
from workpool.server.timestamps import SECOND
from workpool.wire.protocol import STOPPED

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from workpool.server.history import Kind
    from workpool.server.postgres.connection_pool import Connection, ConnectionPool
    from workpool.server.postgres.notifications import NotificationHub
    from workpool.server.stored_item import Item

T = TypeVar("T")

CLOCK: Final = "clock AS MATERIALIZED (SELECT coalesce({}::bigint, workpool_now()) AS now)"
"""The time of a statement; the parameter is the time of a clock that a test moves, or NULL."""
NEXT_VERSION: Final = "i.version + 1 + (random() * 1000000)::bigint"
"""The version of a changed row. After a failover to a database that lacks the last commits, another
change must not get the version of a lost one, which a node may know."""
COUNT_STOPPED: Final = (
    "INSERT INTO stopped_counts (environment_id, shard, count) {}"
    " ON CONFLICT (environment_id, shard)"
    " DO UPDATE SET count = stopped_counts.count + excluded.count"
)
SHARD: Final = "pg_backend_pid() % 16"
"""The counter that a connection adds to: one counter would make all stops wait for each other."""
RECORD: Final = "INSERT INTO history (time, work_id, kind, worker_id, state, lease_end, op) {}"

_NOW: Final = "SELECT coalesce($1::bigint, workpool_now())"
_READ: Final = f"""
SELECT {ITEM_COLUMNS}, i.version, coalesce($3::bigint, workpool_now())
FROM items AS i WHERE i.environment_id = $1 AND i.id = $2
"""
_ATTEMPTS: Final = 3
"""Attempts before the row is locked."""

_UPDATE: Final = f"""
WITH changed AS (
    UPDATE items AS i SET
        state = $4, metadata = coalesce($5, i.metadata), acknowledged_at = $6, started_at = $7,
        heartbeat_at = $8, stop_requested_at = $9, stopped_at = $10, holder = $11,
        delivered_at = $12, lease_end = $13, ttl_seconds = $14, beaten = $15,
        version = {NEXT_VERSION}
    WHERE i.environment_id = $1 AND i.id = $2 AND i.version = $3
    RETURNING i.id, i.version
){{}}{{}}
SELECT max(version) FROM changed
"""
_COUNTED: Final = f"""
, counted AS (
    {COUNT_STOPPED.format(f"SELECT $1, {SHARD}, 1 FROM changed")}
)"""
_RECORDED: Final = f"""
, recorded AS (
    {
    RECORD.format(
        "SELECT r.time, changed.id, r.kind, r.worker_id, r.state, r.lease_end, r.op FROM changed, "
        "unnest($16::bigint[], $17::text[], $18::text[], $19::text[], $20::bigint[], $21::text[])"
        " WITH ORDINALITY AS r (time, kind, worker_id, state, lease_end, op, place) ORDER BY place"
    )
}
)"""
_UPDATES: Final = {
    (stops, recorded): _UPDATE.format(_COUNTED if stops else "", _RECORDED if recorded else "")
    for stops, recorded in product((False, True), repeat=2)
}
"""The statement that replaces an item, by whether the item stops and whether there is a history."""


class ItemChange(NamedTuple):
    """The next version of an item, and its record in the history.

    `at`: microseconds; `op`: as in `history.Record`.
    """

    item: Item
    kind: Kind
    worker_id: str | None
    at: int
    op: str | None = None


class DatabaseCalls:
    """The base of the classes whose methods are the calls of a control plane on one database.

    Args:
        pool: The connections.
        hub: Wakes the polls and streams of all nodes.
        environments: Ids of the environments that this node serves beside those that clients
            created.
        cloud_environments: Ids of environments whose work calls are all refused.
        now: Returns epoch seconds in place of the database's clock, for tests; None: the database's
            clock.
        has_history: Whether each change is recorded in the table `history`.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        hub: NotificationHub,
        *,
        environments: Collection[str],
        cloud_environments: Collection[str] = (),
        now: Callable[[], float] | None = None,
        has_history: bool = False,
    ) -> None:
        self._pool = pool
        self._hub = hub
        self._self_hosted = frozenset(environments)
        self._cloud = frozenset(cloud_environments)
        self._now = now
        self._has_history = has_history

    def _read_test_clock(self) -> int | None:
        """Return the time of a test's clock in microseconds; None: the database's clock is used."""
        return None if self._now is None else int(self._now() * SECOND)

    async def _retry_with_row_lock(
        self, attempt: Callable[[Connection], Awaitable[T | None]], lock: str, *key: str
    ) -> T:
        """Call `attempt` until its result is not None; None means that another change collided.

        After some collisions, the statement `lock` locks the row of `key`, so that the next attempt
        cannot collide.
        """
        for _ in range(_ATTEMPTS):
            result = await attempt(self._pool)
            if result is not None:
                return result

        async def attempt_with_row_lock() -> T:
            async with self._pool.transaction() as connection:
                await connection.execute(lock, *key)
                result = await attempt(connection)
                if result is None:
                    raise RetryableError("concurrent changes collided")
                return result

        return await self._pool.retry_colliding_call(attempt_with_row_lock)

    async def _current_time(self) -> int:
        """Return the current time of the database in microseconds."""
        now: int = await self._pool.fetchval(_NOW, self._read_test_clock())
        return now

    async def _read_item(
        self, connection: Connection, environment_id: str, work_id: str
    ) -> tuple[Item, Item, int, int]:
        """Read an item. Raises a 404 if it is unknown.

        Returns the item as it is stored, the item without an expired lease, the version of its row,
        and the current time.
        """
        row = None
        if has_id_format(work_id):
            row = await connection.fetchrow(_READ, environment_id, work_id, self._read_test_clock())
        if row is None:
            raise APIError(404, "no such work item in this environment")
        stored = item_from_row(row)
        return stored, remove_ended_lease(stored, row[-1]), row[-2], row[-1]

    async def _write_item(
        self, connection: Connection, stored: Item, version: int, changes: Sequence[ItemChange]
    ) -> int | None:
        """Apply `changes` to an item's row, and return the row's new version number.

        None: the stored item has another version than `version`, so nothing was written.
        """
        item = changes[-1].item
        stops = item.state == STOPPED and stored.state != STOPPED
        values: list[Any] = [
            item.environment_id,
            item.id,
            version,
            item.state,
            # With None, the statement does not write the metadata, which may be large.
            None if item.metadata is stored.metadata else to_json(item.metadata),
            item.acknowledged_at,
            item.started_at,
            item.heartbeat_at,
            item.stop_requested_at,
            item.stopped_at,
            item.holder,
            item.delivered_at,
            item.lease_end,
            item.ttl_seconds,
            item.beaten,
        ]
        if self._has_history:
            values += _history_record_columns(changes)
        statement = _UPDATES[stops, self._has_history]
        written: int | None = await connection.fetchval(statement, *values)
        return written


def remove_ended_lease(item: Item, now: int) -> Item:
    """Return the item, but without its lease if the lease has ended by the time `now`."""
    if item.lease_end is None or item.lease_end > now:
        return item
    return state_machine.end_lease(item)


def make_change_that_ends_lease(stored: Item) -> ItemChange:
    """Return the change that ends an item's expired lease."""
    return ItemChange(
        state_machine.end_lease(stored), "lapsed", stored.holder, stored.lease_end or 0
    )


def _history_record_columns(changes: Sequence[ItemChange]) -> list[list[Any]]:
    rows = [
        (each.at, each.kind, each.worker_id, each.item.state, each.item.lease_end, each.op)
        for each in changes
    ]
    return [list(column) for column in zip(*rows, strict=True)]
