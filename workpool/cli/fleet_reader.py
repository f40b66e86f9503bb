"""Reads the load of one environment periodically."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from workpool.cli.item_count import ItemCounter, ItemCounts
from workpool.errors import ControlPlaneError, RefusedError, TransientError
from workpool.scaling import FleetLoad
from workpool.wire.client import WorkClient
from workpool.wire.items import QueueStats

READ_SECONDS: Final = 60.0
"""The longest time of one reading: statistics, and some pages of the list."""
HISTORY_SECONDS: Final = 5.0
"""The wait between two parts of a long history of stopped items."""
WAIT_SECONDS_MAX: Final = 300.0
"""The longest wait that a control plane can ask for."""

log = logging.getLogger("workpool")


class FleetReader:
    """Reads the load of one environment at intervals, and stores the last load and its time.

    Args:
        client: An open client.
        interval: Seconds between two readings.
        max_age: Seconds after which the last load is not reported anymore.
        clock: The monotonic clock.

    Attributes:
        error: The error of the last reading; None if it succeeded, or before the first.
    """

    def __init__(
        self,
        client: WorkClient,
        *,
        interval: float,
        max_age: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.error: ControlPlaneError | None = None
        self._client = client
        self._interval = interval
        self._max_age = max_age
        self._clock = clock
        self._counter = ItemCounter(client)
        self._last: tuple[float, FleetLoad] | None = None
        self._without_statistics = False

    @property
    def load_age_seconds(self) -> float | None:
        """The seconds since the read of the latest load began; None before the first load.

        May be called on any thread.
        """
        last = self._last
        return None if last is None else self._clock() - last[0]

    @property
    def latest_load(self) -> FleetLoad | None:
        """The last load that was read; None before the first, or if it is older than `max_age` s.

        May be called on any thread.
        """
        last = self._last
        return None if last is None or self._clock() - last[0] > self._max_age else last[1]

    def unready_reasons(self) -> list[str]:
        """Return the reason why the load is unknown, as a list; empty if the load is known.

        May be called on any thread.
        """
        if self.latest_load is not None:
            return []
        if (error := self.error) is not None:
            return [f"the queue cannot be read: {error}"]
        return ["the queue is not read to its end yet"]

    async def read_load_periodically(self) -> None:
        """Read the load at intervals until cancelled; a failed read keeps the previous load."""
        while True:
            began_at = self._clock()
            try:
                async with asyncio.timeout(READ_SECONDS):
                    load = await self.read_load()
            except (ControlPlaneError, TimeoutError) as error:
                wait = max(self._interval, self._record_failure(error))
            else:
                if self.error is not None:
                    log.info("queue read again")
                self.error, wait = None, self._interval
                if load is None:
                    wait = min(wait, HISTORY_SECONDS)
                else:
                    self._last = began_at, load
            await asyncio.sleep(wait)

    def _record_failure(self, error: ControlPlaneError | TimeoutError) -> float:
        """Log and store an error; return the seconds that the control plane asks to wait."""
        if isinstance(error, TimeoutError):
            error = TransientError("list", None, "no answer in time", reason="timeout")
        if self.error is None or self.error.status != error.status:
            log.warning("queue not read: %s", error, extra={"error": str(error)})
        self.error = error
        asked = error.retry_after if isinstance(error, TransientError) else None
        return min(WAIT_SECONDS_MAX, asked or 0.0)

    async def read_load(self) -> FleetLoad | None:
        """Read the load once; return None if only stopped items were read and the list goes on.

        The list of items may begin with so many stopped items that one call of this method reads
        only some of them; the next call reads on. Until a call reaches the unfinished items, a load
        would count none of them, and autoscalers would remove busy workers after each restart of
        this process.

        Raises:
            ControlPlaneError: The statistics or the list of items cannot be read.
        """
        # Read the statistics before the list of items: an item that is acknowledged between the two
        # reads then counts twice in the load, as waiting and as running. In the other order, the
        # load would not contain the item, and autoscalers could remove the worker that runs it.
        refusal: RefusedError | None = None
        stats: QueueStats | None = None
        try:
            stats = await self._client.stats()
        # Many credentials have no permission for statistics, so count the items in the list.
        except RefusedError as error:
            refusal = error
        if stats is not None and stats.running is not None:
            return FleetLoad(
                stats.depth, stats.pending, stats.running, _seconds_since(stats.oldest_queued_at)
            )
        count = await self._counter.count_items()
        if refusal is not None:
            self._log_refusal_of_statistics(refusal)
        return None if count.before_unfinished else compute_fleet_load(stats, count)

    def _log_refusal_of_statistics(self, refusal: RefusedError) -> None:
        """Log once that the credential may read the list of items but not the statistics."""
        if not self._without_statistics:
            self._without_statistics = True
            log.warning(
                "statistics refused, so all items are counted in the list: %s",
                refusal,
                extra={"error": str(refusal)},
            )


def compute_fleet_load(stats: QueueStats | None, count: ItemCounts) -> FleetLoad:
    """Compute the load from the count of listed items, and from the statistics if they are known.

    The number of running items comes from the count, because the statistics do not contain it.
    """
    if stats is None:
        oldest = _seconds_since(count.oldest_queued_at)
        return FleetLoad(count.queued, 0, count.running, oldest, lower_bound=not count.complete)
    pending = stats.pending
    if count.complete:
        # Some control planes count running items in `stats.pending`, too. Limit `pending` to the
        # number of delivered items, so that no running item counts twice: `count.queued` includes
        # the delivered items, and `stats.depth` does not.
        pending = min(pending, max(0, count.queued - stats.depth))
    oldest = _seconds_since(stats.oldest_queued_at)
    return FleetLoad(stats.depth, pending, count.running, oldest, lower_bound=not count.complete)


def _seconds_since(time: datetime | None) -> float:
    return 0.0 if time is None else max(0.0, (datetime.now(UTC) - time).total_seconds())
