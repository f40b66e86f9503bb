"""The deletion of ended sessions with their items and events, once their retention is over."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from workpool.server.postgres.database_calls import COUNT_STOPPED, SHARD, DatabaseCalls
from workpool.server.postgres.notifications import make_session_topic

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH_MAX: Final = 100
"""Largest number of sessions that one transaction deletes."""
EVENTS_MAX: Final = 100_000
"""Largest number of events that one transaction deletes, unless a single session has more.

Otherwise a deletion might never end within the time-out of statements.
"""

_STILL_NEEDED: Final = """
SELECT FROM items AS o
WHERE o.session_id = {} AND (o.state <> 'stopped' OR o.stopped_at > $1::bigint)
"""
_FIND: Final = f"""
SELECT s.id, s.event_count FROM sessions AS s WHERE s.id = ANY (ARRAY(
    SELECT i.session_id FROM items AS i
    WHERE i.state = 'stopped' AND i.stopped_at <= $1::bigint
        AND NOT EXISTS ({_STILL_NEEDED.format("i.session_id")})
    ORDER BY i.stopped_at LIMIT {BATCH_MAX}
)) ORDER BY s.id FOR UPDATE OF s SKIP LOCKED
"""
_DELETE: Final = f"""
WITH ended AS MATERIALIZED (
    SELECT s.id FROM unnest($2::text[]) AS s (id)
    WHERE NOT EXISTS ({_STILL_NEEDED.format("s.id")})
), removed AS (
    DELETE FROM items USING ended WHERE items.session_id = ended.id
    RETURNING items.environment_id
), forgotten AS (
    DELETE FROM events USING ended WHERE events.session_id = ended.id
), closed AS (
    DELETE FROM sessions USING ended WHERE sessions.id = ended.id
), counted AS (
    {
    COUNT_STOPPED.format(
        f"SELECT environment_id, {SHARD}, -count(*) FROM removed GROUP BY 1 ORDER BY 1"
    )
}
)
SELECT id FROM ended
"""


class RetentionCalls(DatabaseCalls):
    """The call that deletes sessions whose retention is over."""

    async def delete_ended_sessions(self, retention: int) -> int:
        """Delete sessions whose items all stopped at least `retention` microseconds ago.

        Deletes at most `BATCH_MAX` sessions and returns their number. A session is deleted under
        its lock: a message that creates a new item either comes first, and the session stays, or
        finds no session.
        """
        until = await self._current_time() - retention

        async def delete_batch() -> list[str]:
            async with self._pool.transaction() as connection:
                found = _select_session_ids_to_delete(await connection.fetch(_FIND, until))
                if not found:
                    return []
                return [row[0] for row in await connection.fetch(_DELETE, until, found)]

        deleted = await self._pool.retry_colliding_call(delete_batch)
        for session_id in deleted:
            # The announcement wakes the open streams of the deleted session, which then end.
            self._hub.announce_topic_changes(make_session_topic(session_id))
        return len(deleted)


def _select_session_ids_to_delete(rows: Sequence[Any]) -> list[str]:
    """Return the ids of the first sessions that together have at most `EVENTS_MAX` events.

    The first session is always included, so that a session with more events is deleted too.
    """
    totals = accumulate(row[1] for row in rows)
    return [
        row[0]
        for place, (row, total) in enumerate(zip(rows, totals, strict=True))
        if place == 0 or total <= EVENTS_MAX
    ]
