"""Backlogs: items that a store contains before a benchmark begins, queued or stopped hours ago."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from workpool.server import DEFAULT_ENVIRONMENT, SqliteStore
from workpool.server.postgres.migrations import migrate
from workpool.wire.protocol import ENQUEUE_COUNT_MAX, STOPPED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.server import ControlPlane

POSTGRES = "postgresql://"
HOUR_MS = 3_600_000
_AGE_MS = 10 * HOUR_MS
"""Less than the retention: nothing is deleted during a benchmark."""

_SQLITE = (
    """
    INSERT INTO session (id, environment_id, metadata, created_at)
    WITH RECURSIVE number (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM number WHERE i < :count)
    SELECT printf('sess_%012x7%03x8%015x', :ms + i / 4096, i % 4096, i), :environment, '{}',
           (:ms + i / 4096) * 1000
    FROM number
    """,
    """
    INSERT INTO work (id, environment_id, session_id, created_at, type, state, metadata,
                      acknowledged_at, started_at, heartbeat_at, stopped_at, holder, ttl_seconds,
                      beaten)
    SELECT 'work_' || substr(id, 6), environment_id, id, created_at, 'session', :state, '{}',
           at, at, at, at, iif(at IS NULL, NULL, 'worker'), 60, at IS NOT NULL
    FROM (SELECT *, iif(:state = 'stopped', created_at, NULL) AS at FROM session
          WHERE id > printf('sess_%012x', :ms))
    """,
)
"""Both kinds of backlog; `:ms` is the time of the first one in milliseconds."""

_SESSIONS = """
    INSERT INTO sessions (id, environment_id, metadata, created_at, work_id)
    SELECT 'sess_' || digits, $3, '{}', ms * 1000, 'work_' || digits
    FROM generate_series(1, $1::bigint) AS number (i),
        LATERAL (SELECT $2::bigint + i / 4096 AS ms) AS clock,
        LATERAL (SELECT lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(i % 4096), 3, '0') || '8'
            || lpad(to_hex(i), 15, '0') AS digits) AS id
"""
_ITEMS = """
    INSERT INTO items (id, environment_id, session_id, created_at, type, state, metadata,
                       acknowledged_at, started_at, heartbeat_at, stopped_at, holder, ttl_seconds,
                       beaten)
    SELECT work_id, environment_id, id, created_at, 'session', $1, '{}', at, at, at, at,
           CASE WHEN at IS NOT NULL THEN 'worker' END, 60, at IS NOT NULL
    FROM sessions, LATERAL (SELECT CASE WHEN $1 = 'stopped' THEN created_at END AS at) AS stop
    WHERE created_at >= $2::bigint * 1000
"""
_STOPPED = "INSERT INTO stopped_counts VALUES ($1, 0, $2)"


@dataclass(frozen=True)
class Backlog:
    """The numbers of items that a store contains before a benchmark begins."""

    stopped: int = 0
    queued: int = 0


def create_backlog_in_store(store: str, backlog: Backlog) -> None:
    """Create the tables and the items of the backlog in a new SQLite file or an empty database."""
    asyncio.run(_create_tables(store))
    now = time.time_ns() // 1_000_000
    parts = [
        ("stopped", backlog.stopped, now - _AGE_MS),
        ("queued", backlog.queued, now - HOUR_MS),
    ]
    if store.startswith(POSTGRES):
        asyncio.run(_create_backlog_in_database(store, parts))
        return
    with closing(sqlite3.connect(store)) as connection, connection:
        for state, count, start in parts:
            values = {
                "count": count,
                "ms": start,
                "state": state,
                "environment": DEFAULT_ENVIRONMENT,
            }
            for statement in _SQLITE if count else ():
                connection.execute(statement, values)


async def _create_backlog_in_database(url: str, parts: Sequence[tuple[str, int, int]]) -> None:
    connection = await asyncpg.connect(url)
    try:
        for state, count, start in parts:
            await connection.execute(_SESSIONS, count, start, DEFAULT_ENVIRONMENT, timeout=600)
            await connection.execute(_ITEMS, state, start, timeout=600)
            if state == STOPPED:
                await connection.execute(_STOPPED, DEFAULT_ENVIRONMENT, count)
        # Vacuum now: an autovacuum of these rows during the benchmark would distort the results.
        await connection.execute("VACUUM ANALYZE", timeout=600)
        await connection.execute("CHECKPOINT", timeout=600)
    finally:
        await connection.close()


async def _create_tables(place: str) -> None:
    if place.startswith(POSTGRES):
        await migrate(place)
        return
    store = SqliteStore(place)
    await store.open()
    await store.close()


def create_backlog_in_memory(plane: ControlPlane, backlog: Backlog) -> None:
    """Create the items of the backlog in a control plane that runs in this process."""
    environment_id = plane.environments[0]
    for count, stops in ((backlog.stopped, True), (backlog.queued, False)):
        for start in range(0, count, ENQUEUE_COUNT_MAX):
            for item in plane.enqueue(min(ENQUEUE_COUNT_MAX, count - start)):
                if stops:
                    plane.operations.stop_item(environment_id, item.id, force=True)
