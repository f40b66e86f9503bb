"""The loop that writes the deletion cost, after changes only and at a bounded rate."""

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

LOOK_SECONDS: Final = 30.0
"""Seconds after which the cost is looked up again without an event."""
BACKOFF_SECONDS: Final = 300.0
"""The longest pause between two writes that fail, in seconds."""


class CostWriter:
    """Keeps a written value in step with a computed one.

    Args:
        cost: Returns the value to write; None: no value is to be written now.
        write: Writes a value; raises `APIServerError`.
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

    def look(self) -> None:
        """Let the loop call `cost` soon, because the value may have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Write the cost now and after each change, until cancelled."""
        while True:
            self._changed.clear()
            cost = self._cost()
            if cost is None:
                self._written = None  # another pool's plugin may write
            if cost is not None and cost != self._written:
                await self._try_write(cost)
                await asyncio.sleep(self._pause_seconds())
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._changed.wait()

    async def _try_write(self, cost: int) -> None:
        # The stored value is unknown until the answer: a write without one may have been applied.
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

    def _pause_seconds(self) -> float:
        """Return the pause after a write: longer after each failure, spread over the pods."""
        if not self._failures:
            return self._interval
        ceiling = min(BACKOFF_SECONDS, self._interval * 2.0 ** min(self._failures, 16))
        return max(self._interval, random.uniform(0.5, 1.0) * ceiling)  # noqa: S311 - no secret


@asynccontextmanager
async def writing(writer: CostWriter) -> AsyncIterator[CostWriter]:
    """Run the writer in a task of its own until the end of the block."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(writer.run(), name="deletion-cost")
        try:
            yield writer
        finally:
            task.cancel()
