"""The periodic reading of the load of one environment."""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from workpool.cli.item_count import ItemCount, ItemCounter
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
    """Reads the load of one environment at intervals, and stores the last load with its age.

    Args:
        client: An open client.
        interval: Seconds between two readings.
        max_age: Seconds for which a reading counts.
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
    def age_seconds(self) -> float | None:
        """The age of the last reading; None before the first one. May be read on any thread."""
        last = self._last
        return None if last is None else self._clock() - last[0]

    @property
    def load(self) -> FleetLoad | None:
        """The last load; None without one or if it is too old. May be read on any thread."""
        last = self._last
        return None if last is None or self._clock() - last[0] > self._max_age else last[1]

    def unready(self) -> list[str]:
        """The reasons why there is no load. May be called on any thread."""
        if self.load is not None:
            return []
        if (error := self.error) is not None:
            return [f"the queue cannot be read: {error}"]
        return ["the queue is not read to its end yet"]

    async def run(self) -> None:
        """Read until cancelled. A failure leaves the last load, which grows older."""
        while True:
            began_at = self._clock()
            try:
                async with asyncio.timeout(READ_SECONDS):
                    load = await self.read()
            except (ControlPlaneError, TimeoutError) as error:
                wait = max(self._interval, self._failed(error))
            else:
                if self.error is not None:
                    log.info("queue read again")
                self.error, wait = None, self._interval
                if load is None:
                    wait = min(wait, HISTORY_SECONDS)
                else:
                    self._last = began_at, load
            await asyncio.sleep(wait)

    def _failed(self, error: ControlPlaneError | TimeoutError) -> float:
        """Record a failure; return the seconds for which the control plane wants no request."""
        if isinstance(error, TimeoutError):
            error = TransientError("list", None, "no answer in time", reason="timeout")
        if self.error is None or self.error.status != error.status:
            log.warning("queue not read: %s", error, extra={"error": str(error)})
        self.error = error
        asked = error.retry_after if isinstance(error, TransientError) else None
        return min(WAIT_SECONDS_MAX, asked or 0.0)

    async def read(self) -> FleetLoad | None:
        """Read the load once; None while only stopped items of the list were read.

        A long history of stopped items is read in several calls. Before they reach the unfinished
        items, a load would count none of these, and autoscalers would remove busy workers after
        each restart of this process.

        Raises:
            ControlPlaneError: Statistics or list cannot be read.
        """
        # The statistics are read before the list, so an item that is acknowledged in between counts
        # twice. In the other order it would not count at all, and a busy worker could be removed.
        refusal: RefusedError | None = None
        stats: QueueStats | None = None
        try:
            stats = await self._client.stats()
        except RefusedError as error:  # many keys of workers may list and not read statistics
            refusal = error
        if stats is not None and stats.running is not None:
            return FleetLoad(
                stats.depth, stats.pending, stats.running, _seconds_since(stats.oldest_queued_at)
            )
        count = await self._counter.count()
        if refusal is not None:
            self._log_refusal(refusal)
        return None if count.before_unfinished else load_of(stats, count)

    def _log_refusal(self, refusal: RefusedError) -> None:
        """Log once that statistics are refused, although the credential is accepted."""
        if not self._without_statistics:
            self._without_statistics = True
            log.warning(
                "statistics refused, so all items are counted in the list: %s",
                refusal,
                extra={"error": str(refusal)},
            )


def load_of(stats: QueueStats | None, count: ItemCount) -> FleetLoad:
    """Return the load from the list's count and from statistics that lack the running items."""
    if stats is None:
        oldest = _seconds_since(count.oldest_queued_at)
        return FleetLoad(count.queued, 0, count.running, oldest, lower_bound=not count.complete)
    pending = stats.pending
    if count.complete:
        # Some control planes count running items as pending; these must not count twice.
        pending = min(pending, max(0, count.queued - stats.depth))
    oldest = _seconds_since(stats.oldest_queued_at)
    return FleetLoad(stats.depth, pending, count.running, oldest, lower_bound=not count.complete)


def _seconds_since(time: datetime | None) -> float:
    return 0.0 if time is None else max(0.0, (datetime.now(UTC) - time).total_seconds())
