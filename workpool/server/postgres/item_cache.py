"""A cache of item rows, so that a node changes an item with one statement instead of two.

A poll's answer is mostly followed by the ack, the first heartbeat and the stop on the same node, so
the node keeps the last rows that it read or wrote. A change is decided on the known row, and
written on the condition that the row still has the known version and a lease that has not ended.
Otherwise nothing is written, and the caller reads the row.

The time of the change is the database's at the write, which the decision does not know. The rules
only add something to the time. So the decision is made twice, for two successive times, and the
statement moves those times of the new item that differ between the two.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import product
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server.api_errors import APIError
from workpool.server.postgres.database_calls import (
    CLOCK,
    COUNT_STOPPED,
    NEXT_VERSION,
    RECORD,
    SHARD,
)
from workpool.server.postgres.row_codec import ITEM_COLUMNS, ITEM_FIELDS, item_from_row, to_json
from workpool.wire.protocol import STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server.postgres.connection_pool import Connection
    from workpool.server.postgres.database_calls import ItemChange
    from workpool.server.stored_item import Item

KNOWN_MAX: Final = 10_000
"""Largest number of known items."""
KNOWN_METADATA_MAX: Final = 4096
"""Largest length of the metadata of a known item."""

_TIMES: Final = (
    "acknowledged_at",
    "started_at",
    "heartbeat_at",
    "stop_requested_at",
    "stopped_at",
    "lease_end",
)
_TIMES_OF: Final = attrgetter(*_TIMES)
_FIRST: Final = 10
"""The parameter of the first of these times."""
_MOVED: Final = ", ".join(
    f"{name} = ${place}::bigint + (clock.now - $8::bigint) * ($9::bigint[])[{place - _FIRST + 1}]"
    for place, name in enumerate(_TIMES, _FIRST)
    if name != "heartbeat_at"
)
_HEARTBEAT_PLACE: Final = _FIRST + _TIMES.index("heartbeat_at")
_CHANGE: Final = f"""
WITH {CLOCK.format("$7")}, changed AS (
    UPDATE items AS i SET
        state = $4, metadata = coalesce($5, i.metadata), ttl_seconds = $6, {_MOVED},
        heartbeat_at = CASE ($9::bigint[])[{_TIMES.index("heartbeat_at") + 1}]
            -- as in state_machine: two heartbeats in one microsecond must differ
            WHEN 1 THEN greatest(
                ${_HEARTBEAT_PLACE}::bigint + clock.now - $8::bigint, i.heartbeat_at + 1
            )
            ELSE ${_HEARTBEAT_PLACE}::bigint END,
        holder = $16, delivered_at = $17, beaten = $18, version = {NEXT_VERSION}
    FROM clock
    WHERE i.environment_id = $1 AND i.id = $2 AND i.version = $3
        AND (i.lease_end IS NULL OR i.lease_end > clock.now)
    RETURNING {ITEM_COLUMNS}, i.version
){{}}{{}}
SELECT {ITEM_COLUMNS}, i.version, clock.now FROM changed AS i, clock
"""
_COUNTED: Final = f", counted AS ({COUNT_STOPPED.format(f'SELECT $1, {SHARD}, 1 FROM changed')})"
_RECORDED: Final = f""", recorded AS ({
    RECORD.format(
        "SELECT clock.now, changed.id, $19, $20, changed.state, changed.lease_end, $21 "
        "FROM changed, clock"
    )
})"""
_CHANGES: Final = {
    (stops, recorded): _CHANGE.format(_COUNTED if stops else "", _RECORDED if recorded else "")
    for stops, recorded in product((False, True), repeat=2)
}
"""The statement, by whether the item stops and whether there is a history."""


class CachedItem(NamedTuple):
    """An item's row, as this node last read or wrote it.

    `seen_at`: the database's time when this node read or wrote the row, in microseconds.
    """

    item: Item
    version: int
    seen_at: int


class ItemCache:
    """The rows that this node has read or written last, by environment and item id."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], CachedItem] = OrderedDict()

    def put(self, item: Item, version: int, seen_at: int) -> None:
        """Add a row, unless its item is stopped or its metadata is large."""
        size = sum(len(key) + len(value) for key, value in item.metadata.items())
        if item.state == STOPPED or size > KNOWN_METADATA_MAX:
            return
        self._known[item.environment_id, item.id] = CachedItem(item, version, seen_at)
        self._known.move_to_end((item.environment_id, item.id))
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def pop(self, environment_id: str, work_id: str) -> CachedItem | None:
        """Remove and return a row that is about to change; None if the cache does not have it."""
        return self._known.pop((environment_id, work_id), None)


async def change_cached_item(
    connection: Connection,
    known: CachedItem,
    decide: Callable[[Item, int], ItemChange],
    *,
    now: int | None,
    has_history: bool,
) -> CachedItem | None:
    """Change an item whose row is cached, with one statement, and return the changed row.

    Returns None if nothing was written: the row has changed meanwhile, its lease has ended, or
    `decide` raised an error or changed nothing, which only the current row can confirm.

    `decide`: returns the change for the item and the time.
    `now`: the time of a clock that a test moves; None: the time of the database.
    """
    stored = known.item
    time = max(known.seen_at, stored.heartbeat_at or 0) + 1
    try:
        change, later = decide(stored, time), decide(stored, time + 1)
    except APIError:
        return None
    item = change.item
    if item is stored:
        return None
    times = _TIMES_OF(item)
    moved = [int(one != other) for one, other in zip(times, _TIMES_OF(later.item), strict=True)]
    values: list[Any] = [
        item.environment_id,
        item.id,
        known.version,
        item.state,
        None if item.metadata is stored.metadata else to_json(item.metadata),
        item.ttl_seconds,
        now,
        time,
        moved,
        *times,
        item.holder,
        item.delivered_at,
        item.beaten,
    ]
    if has_history:
        values += [change.kind, change.worker_id, change.op]
    row = await connection.fetchrow(_CHANGES[item.state == STOPPED, has_history], *values)
    if row is None:
        return None
    version, seen_at = row[len(ITEM_FIELDS) :]
    return CachedItem(item_from_row(row), version, seen_at)
