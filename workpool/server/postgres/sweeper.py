"""Periodic background work: ends expired leases, and deletes ended sessions.

Calls apply lapses by themselves; the sweep makes them known to calls that wait. Any node may sweep,
one at a time, under an advisory lock that ends with its transaction: no node is a leader, and one
that stops in the middle is followed by another.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from workpool.server.postgres.database_errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from workpool.server.postgres.connection_pool import ConnectionPool

    Batch = Callable[[], Awaitable[int]]

SWEEP_SECONDS: Final = 1.0
"""Mean time between two attempts of one node."""
_SWEEP_MAX_SECONDS: Final = 3.0
"""Time after which no further batch begins, so that the lock's transaction stays short."""
ADVISORY_LOCK: Final = 0x737765657065720A
"""A number for the advisory lock: "sweeper"."""


class Sweeper:
    """Runs the periodic background work of one node.

    Args:
        pool: The connections of the node.
        batches: Calls that change a bounded number of rows each, in a transaction of their own, and
            return that number; each is repeated until it returns 0.
    """

    def __init__(self, pool: ConnectionPool, *batches: Batch) -> None:
        self._pool = pool
        self._batches = batches

    async def run(self) -> None:
        """Sweep periodically until cancelled, even while the database is unavailable."""
        while True:
            # The pause is random: after a fixed pause, all nodes could request the lock at once.
            await asyncio.sleep(random.uniform(0.5, 1.5) * SWEEP_SECONDS)  # noqa: S311 - no secret
            with suppress(UnavailableError):  # the connection pool has logged the error
                await self.sweep()

    async def sweep(self) -> bool:
        """Run `batches` unless another node is running them; return whether this node ran them."""
        async with self._pool.transaction() as connection:
            taken = "SELECT pg_try_advisory_xact_lock($1)"
            if not await connection.fetchval(taken, ADVISORY_LOCK):
                return False
            loop = asyncio.get_running_loop()
            end = loop.time() + _SWEEP_MAX_SECONDS
            for batch in self._batches:
                while await batch() and loop.time() < end:
                    pass
            return True
