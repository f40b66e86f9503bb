"""The engine on PostgreSQL, where any number of equal nodes share one database.

All state is in the database, and every call is one transaction, or a few that each leave a state
which other calls may see. See workpool/docs/control-plane.md, "PostgreSQL".
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any, Final

from workpool.server.postgres.connection_pool import ConnectionPool
from workpool.server.postgres.migrations import migrate
from workpool.server.postgres.notifications import NotificationHub
from workpool.server.postgres.read_calls import ReadCalls
from workpool.server.postgres.retention_calls import RetentionCalls
from workpool.server.postgres.sweeper import Sweeper
from workpool.server.timestamps import SECOND

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MAKE_SIGNING_KEY: Final = """
INSERT INTO settings (name, value) VALUES ('signing_key', $1) ON CONFLICT (name) DO NOTHING
"""
_SIGNING_KEY: Final = "SELECT value FROM settings WHERE name = 'signing_key'"


class PostgresEngine(ReadCalls, RetentionCalls):
    """The calls of the protocol on one database.

    Args:
        url: The database. It may contain a password, so it is never shown.
        retention: Seconds for which a stopped item is kept with its session; None: forever.
        options: The further arguments of `DatabaseCalls`.
    """

    def __init__(self, url: str, *, retention: float | None = None, **options: Any) -> None:
        super().__init__(ConnectionPool(url), NotificationHub(url), **options)
        self._url = url
        self._retention = retention
        self.signing_key = b""
        self._running: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Upgrade the schema, connect, and start the background tasks. Raises `ServeError`."""
        await migrate(self._url)
        await self._pool.open()
        # A second statement reads the key for item tokens. If another node inserts a key at the
        # same time, the first statement inserts nothing and cannot return the other node's key.
        await self._pool.execute(_MAKE_SIGNING_KEY, secrets.token_bytes(32))
        self.signing_key = await self._pool.fetchval(_SIGNING_KEY)
        self._opened_at = await self._current_time()
        self._running = asyncio.get_running_loop().create_task(
            self._run_background_tasks(), name="postgres"
        )

    async def close(self) -> None:
        """End the background tasks and close all connections."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            await asyncio.wait([running])
        await self._pool.close()

    async def wait_for_failure(self) -> None:
        """Wait until a background task fails. An unavailable database does not make a task fail."""
        if self._running is not None:
            await asyncio.shield(self._running)

    def end_waiting_calls(self) -> None:
        """End all waits of polls and streams, and forbid new waits, because the server closes."""
        self._closing = True
        self._hub.end_waiting_calls()

    async def _run_background_tasks(self) -> None:
        """Run the notification hub and the sweeper until cancelled."""
        batches: list[Callable[[], Awaitable[int]]] = [
            self.end_batch_of_expired_leases,
            self.delete_idle_pollers,
        ]
        if self._retention is not None:
            retention = int(self._retention * SECOND)
            batches.append(lambda: self.delete_ended_sessions(retention))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hub.run())
            group.create_task(Sweeper(self._pool, *batches).run())
