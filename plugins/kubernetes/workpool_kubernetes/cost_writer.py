"""Writes the deletion cost of the worker's pod after each change, at a limited rate."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from workpool_kubernetes.api_server import APIServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

log = logging.getLogger("workpool.kubernetes")

RECHECK_SECONDS: Final = 30.0
"""Seconds after which the cost is computed again without a request."""
MAX_BACKOFF_SECONDS: Final = 300.0
"""The longest pause after a failed write, in seconds."""


class CostWriter:
    """Computes the deletion cost after each request for an update, and writes it if it has changed.

    Args:
        cost: Computes the cost; returns None if this writer must not write now.
        write: Writes a cost, or raises `APIServerError`.
        interval: The shortest time between two writes, in seconds.
    """

    def __init__(
        self,
        cost: Callable[[], int | None],
        write: Callable[[int], Awaitable[None]],
        interval: float,
    ) -> None:
        self._cost = cost
        self._write = write
        self._interval = interval
        self._changed = asyncio.Event()
        self._written: int | None = None
        self._failures = 0

    def request_deletion_cost_update(self) -> None:
        """Make the running writer compute the cost now, and write it if it has changed."""
        self._changed.set()

    async def write_deletion_cost_changes(self) -> None:
        """Write the cost at once and after each change, until cancelled."""
        while True:
            self._changed.clear()
            cost = self._cost()
            if cost is None:
                # Forget the cost that this writer has written. The writer of another pool in this
                # process may now write a different cost.
                self._written = None
            if cost is not None and cost != self._written:
                await self._try_to_write_cost(cost)
                await asyncio.sleep(self._seconds_until_next_write())
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await self._changed.wait()

    async def _try_to_write_cost(self, cost: int) -> None:
        # The stored cost is unknown until a write succeeds, because the API server may have applied
        # a write whose answer was lost.
        self._written = None
        try:
            await self._write(cost)
        except APIServerError as error:
            self._failures += 1
            log.warning(
                "deletion cost not written: %s",
                error,
                extra={"in_a_row": self._failures, "error": str(error)},
            )
        else:
            self._written = cost
            if self._failures:
                log.info("deletion cost written again", extra={"in_a_row": self._failures})
            self._failures = 0

    def _seconds_until_next_write(self) -> float:
        """Return the pause after a write: `interval`, or longer and random after failed writes."""
        if not self._failures:
            return self._interval
        ceiling = min(MAX_BACKOFF_SECONDS, self._interval * 2.0 ** min(self._failures, 16))
        return max(self._interval, random.uniform(0.5, 1.0) * ceiling)  # noqa: S311 - no secret


@asynccontextmanager
async def running_cost_writer(writer: CostWriter) -> AsyncIterator[CostWriter]:
    """Run `writer.write_deletion_cost_changes` in a task during the `with` block."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(writer.write_deletion_cost_changes(), name="deletion-cost")
        try:
            yield writer
        finally:
            task.cancel()
