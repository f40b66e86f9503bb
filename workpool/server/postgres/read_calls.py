"""The calls that only read: lists, streams of events, statistics and history.

A list of items or sessions shows each lease's end; one that selects by state first lets the
leases lapse that have ended, as the statistics do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from workpool.server.conversation import EVERY_EVENT
from workpool.server.operations import LOOKED_AT_MAX
from workpool.server.pagination import ListPage, make_page
from workpool.server.postgres.database_calls import CLOCK, remove_ended_lease
from workpool.server.postgres.notifications import make_session_topic
from workpool.server.postgres.row_codec import (
    ITEM_COLUMNS,
    RECORD_COLUMNS,
    VIEW_COLUMNS,
    event_from_columns,
    history_record_from_row,
    is_storable_text,
    item_from_row,
    session_view_from_row,
)
from workpool.server.postgres.session_calls import StoredSessionCalls
from workpool.server.queue.work_queue import WorkQueueStats
from workpool.server.timestamps import MILLISECOND, SECOND
from workpool.wire.protocol import (
    RECLAIM_OLDER_THAN_MS,
    STATES,
    WORKERS_POLLING_WINDOW_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from workpool.server.conversation import EventFilter, StoredEvent
    from workpool.server.history import Record
    from workpool.server.parsing.request_values import ItemFilter, ListPageRequest
    from workpool.server.stored_item import Item
    from workpool.server.stored_session import SessionFilter, SessionView

BATCH_ROWS: Final = 500
"""Rows that a filtered list reads at once."""
FOLLOWED_MAX: Final = 100
FOLLOWED_BYTES: Final = 64 * 1024
"""Events and bytes that one wait of a stream returns at most, though at least one event."""

_END: Final = "~"
"""A text after every id. A place that may be absent would be no condition for an index."""

_ITEMS: Final = f"""
SELECT {ITEM_COLUMNS}, coalesce($5::bigint, workpool_now()) FROM items AS i
WHERE i.environment_id = $1 AND i.id > $2 AND i.id < $3 {{}}
ORDER BY i.id {{}} LIMIT $4
"""
_IN_STATE: Final[Mapping[str | None, str]] = {
    None: "",
    **{state: f"AND i.state = '{state}'" for state in STATES},
}
"""The condition of a list by its state, as a constant: the partial indexes need one."""
_SESSIONS: Final = f"""
SELECT {VIEW_COLUMNS}, coalesce($4::bigint, workpool_now())
FROM sessions AS s JOIN items AS i ON i.environment_id = s.environment_id AND i.id = s.work_id
WHERE s.id > $1 AND s.id < $2 AND (
    s.environment_id = ANY ($5::text[])
    OR EXISTS (SELECT FROM environments AS e WHERE e.id = s.environment_id)
)
ORDER BY s.id {{}} LIMIT $3
"""
_EVENTS: Final = """
SELECT id, value FROM events
WHERE session_id = $1 AND id > $2 AND id < $3
    AND ($4::text[] IS NULL OR type = ANY ($4))
    AND ($5::text IS NULL OR processed_at > $5) AND ($6::text IS NULL OR processed_at >= $6)
    AND ($7::text IS NULL OR processed_at < $7) AND ($8::text IS NULL OR processed_at <= $8)
ORDER BY id {} LIMIT $9
"""
_PLACE: Final = """
SELECT CASE WHEN $2::text IS NULL THEN s.event_count ELSE coalesce(
    (SELECT e.seq FROM events AS e WHERE e.session_id = s.id AND e.id = $2), 0
) END FROM sessions AS s WHERE s.id = $1
"""
_FOLLOWING: Final = f"""
SELECT e.id, e.value FROM sessions AS s LEFT JOIN (
    SELECT id, value, seq FROM (
        SELECT id, value, seq, sum(length(value)) OVER (ORDER BY seq) - length(value) AS earlier
        FROM (
            SELECT id, value, seq FROM events WHERE session_id = $1 AND seq > $2
            ORDER BY seq LIMIT {FOLLOWED_MAX}
        ) AS next
    ) AS sized WHERE earlier < {FOLLOWED_BYTES}
) AS e ON true
WHERE s.id = $1 ORDER BY e.seq
"""
"""The next events of a session: one row without an id if there are none, none without a session."""
_STATS: Final = f"""
WITH {CLOCK.format("$2")}, queued AS (
    SELECT count(*) AS number, count(*) FILTER (WHERE i.delivered_at > clock.now - $3::bigint)
        AS pending
    FROM clock LEFT JOIN items AS i ON i.environment_id = $1 AND i.state = 'queued'
    WHERE i.id IS NOT NULL
)
SELECT queued.number - queued.pending, queued.pending,
    (
        SELECT i.created_at FROM items AS i
        WHERE i.environment_id = $1 AND i.state = 'queued' ORDER BY i.id LIMIT 1
    ),
    (
        SELECT count(*) FROM pollers AS p
        WHERE p.environment_id = $1 AND p.seen_at > clock.now - $4::bigint
    ),
    (
        SELECT count(*) FROM items AS i
        WHERE i.environment_id = $1 AND i.state IN ('starting', 'active', 'stopping')
    ),
    (SELECT coalesce(sum(c.count), 0) FROM stopped_counts AS c WHERE c.environment_id = $1),
    clock.now
FROM queued, clock
"""
_HISTORY: Final = f"SELECT {RECORD_COLUMNS} FROM history ORDER BY number"


class ReadCalls(StoredSessionCalls):
    """The calls that read lists, streams of events, statistics and the history."""

    async def list_items(
        self, environment_id: str, place: ListPageRequest, wanted: ItemFilter | None = None
    ) -> ListPage[Item]:
        """Return a page of the items that match the filter `wanted`, in the filter's order."""
        if wanted is not None:
            return await self._search_items(environment_id, place, wanted)
        limit, after, before = place
        backwards = before is not None
        found = await self._read_items(
            environment_id, after, before, limit + 1, backwards=backwards
        )
        return make_page(found[::-1] if backwards else found, limit, backwards=backwards)

    async def _search_items(
        self, environment_id: str, place: ListPageRequest, wanted: ItemFilter
    ) -> ListPage[Item]:
        """Return a page of the items that match; stop after reading `LOOKED_AT_MAX` items."""
        await self._end_due_leases(environment_id)
        limit, after, before = place
        backwards = wanted.newest_first or before is not None
        found: list[Item] = []
        looked = 0
        last: str | None = None
        more = True
        while more and len(found) < limit and looked < LOOKED_AT_MAX:
            rows = await self._read_items(
                environment_id, after, before, BATCH_ROWS, wanted.state, backwards=backwards
            )
            more = len(rows) == BATCH_ROWS
            for item in rows:
                if len(found) == limit:
                    more = True
                    break
                looked += 1
                last = item.id
                if wanted.matches(item):
                    found.append(item)
            if backwards:
                before = last
            else:
                after = last or after
        if backwards and not wanted.newest_first:
            found.reverse()
        return ListPage(found, more, backwards, last if more else None)

    async def _read_items(
        self,
        environment_id: str,
        after: str,
        before: str | None,
        limit: int,
        state: str | None = None,
        *,
        backwards: bool,
    ) -> list[Item]:
        statement = _ITEMS.format(_IN_STATE[state], "DESC" if backwards else "")
        rows = await self._pool.fetch(
            statement, environment_id, after, before or _END, limit, self._read_test_clock()
        )
        return [remove_ended_lease(item_from_row(row), row[-1]) for row in rows]

    async def list_sessions(
        self, place: ListPageRequest, wanted: SessionFilter
    ) -> ListPage[SessionView]:
        """Return a page of the sessions that match the filter `wanted`."""
        limit = place.limit
        backwards = wanted.newest_first or place.before is not None
        found: list[SessionView] = []
        async for view in self._iterate_sessions(place, backwards=backwards):
            if wanted.matches(view):
                found.append(view)
            if len(found) > limit:
                break
        if backwards and not wanted.newest_first:
            found.reverse()
        return make_page(found, limit, backwards=backwards, newest_first=wanted.newest_first)

    async def _iterate_sessions(
        self, place: ListPageRequest, *, backwards: bool
    ) -> AsyncIterator[SessionView]:
        """Yield a `SessionView` of each session with an id between those in `place`."""
        _, after, before = place
        statement = _SESSIONS.format("DESC" if backwards else "")
        batch = place.limit + 1
        rows: Sequence[Any] = [None] * batch
        while len(rows) == batch:
            rows = await self._pool.fetch(
                statement,
                after,
                before or _END,
                batch,
                self._read_test_clock(),
                [*self._self_hosted],
            )
            for row in rows:
                view = session_view_from_row(row)
                yield view._replace(item=remove_ended_lease(view.item, row[-1]))
            if rows and backwards:
                before = rows[-1][0]
            elif rows:
                after = rows[-1][0]

    async def list_events(
        self, session_id: str, place: ListPageRequest, wanted: EventFilter = EVERY_EVENT
    ) -> ListPage[StoredEvent]:
        """Return a page of a session's events that match the filter `wanted`."""
        limit, after, before = place
        backwards = wanted.newest_first or before is not None
        types = None if wanted.types is None else [*filter(is_storable_text, wanted.types)]
        statement = _EVENTS.format("DESC" if backwards else "")
        rows = await self._pool.fetch(
            statement, session_id, after, before or _END, types, *wanted.times, limit + 1
        )
        found = [event_from_columns(session_id, *row) for row in rows]
        if backwards and not wanted.newest_first:
            found.reverse()
        return make_page(
            found, limit, backwards=before is not None, newest_first=wanted.newest_first
        )

    async def count_events_to_skip(self, session_id: str, last_event_id: str | None) -> int:
        """Return how many events a stream skips: those up to and including `last_event_id`."""
        if last_event_id is not None and not is_storable_text(last_event_id):
            return 0
        return await self._pool.fetchval(_PLACE, session_id, last_event_id) or 0

    async def wait_for_events(
        self, session_id: str, place: int, seconds: float
    ) -> Sequence[StoredEvent] | None:
        """Wait until a session has more than `place` events; return the events after these."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not self._closing:
            seen = self._hub.get_change_count()
            rows = await self._pool.fetch(_FOLLOWING, session_id, place)
            if not rows:
                return None
            if rows[0][0] is not None:
                return [event_from_columns(session_id, *row) for row in rows]
            remaining = deadline - loop.time()
            announced = await self._hub.wait_for_topic_change(
                make_session_topic(session_id), seen, max(0, remaining)
            )
            if not announced and loop.time() >= deadline:
                # Return without another read of the database, which would find no events. With
                # 1000 streams without events, there would be such a read every 10 ms.
                return ()
        return None

    async def queue_stats(self, environment_id: str) -> WorkQueueStats:
        """Return the statistics of an environment's queue."""
        await self._end_due_leases(environment_id)
        row = await self._pool.fetchrow(
            _STATS,
            environment_id,
            self._read_test_clock(),
            RECLAIM_OLDER_THAN_MS * MILLISECOND,
            WORKERS_POLLING_WINDOW_SECONDS * SECOND,
        )
        depth, pending, oldest, polling, running, stopped, now = row
        return WorkQueueStats(depth, pending, oldest, polling, running, int(stopped), now)

    async def read_history(self) -> Sequence[Record]:
        """Return the recorded history of all items, the oldest record first."""
        return [history_record_from_row(row) for row in await self._pool.fetch(_HISTORY)]
