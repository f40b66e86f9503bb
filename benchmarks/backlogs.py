"""Items that a store has before a benchmark begins: queued ones, and stopped ones of hours ago."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workpool.server import DEFAULT_ENVIRONMENT, SqliteStore
from workpool.wire.protocol import ENQUEUE_COUNT_MAX

if TYPE_CHECKING:
    from workpool.server import ControlPlane

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


@dataclass(frozen=True)
class Backlog:
    """The numbers of items."""

    stopped: int = 0
    queued: int = 0


def fill(store: str, backlog: Backlog) -> None:
    """Write the backlog to an empty SQLite file."""
    asyncio.run(_create(store))
    now = time.time_ns() // 1_000_000
    with closing(sqlite3.connect(store)) as connection, connection:
        for state, count, age in (
            ("stopped", backlog.stopped, _AGE_MS),
            ("queued", backlog.queued, HOUR_MS),
        ):
            values = {
                "count": count,
                "ms": now - age,
                "state": state,
                "environment": DEFAULT_ENVIRONMENT,
            }
            for statement in _SQLITE if count else ():
                connection.execute(statement, values)


async def _create(path: str) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.close()


def fill_memory(plane: ControlPlane, backlog: Backlog) -> None:
    """Create the items of the backlog in a control plane that runs in this process."""
    environment_id = plane.environments[0]
    for count, stops in ((backlog.stopped, True), (backlog.queued, False)):
        for start in range(0, count, ENQUEUE_COUNT_MAX):
            for item in plane.enqueue(min(ENQUEUE_COUNT_MAX, count - start)):
                if stops:
                    plane.operations.stop(environment_id, item.id, force=True)
