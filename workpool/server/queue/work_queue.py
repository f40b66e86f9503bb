"""The items of one environment, indexed so that no query scans all of them.

Owns the indexes of items: undelivered, delivered and leased ones. `state_machine` makes all
decisions.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from workpool.server.api_errors import APIError
from workpool.server.ascending_ids import AscendingIdList, iterate_ids
from workpool.server.queue.deliveries import Deliveries
from workpool.server.queue.lease_ends import LeaseEndTimes
from workpool.server.queue.long_polls import WaitingPolls
from workpool.server.timestamps import MILLISECOND, SECOND, format_time_with_whole_seconds
from workpool.wire.protocol import (
    QUEUED,
    RECLAIM_OLDER_THAN_MS,
    STOPPED,
    WORK_QUEUE_STATS,
    WORKERS_POLLING_WINDOW_SECONDS,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workpool.server.stored_item import Item

_WINDOW: Final = RECLAIM_OLDER_THAN_MS * MILLISECOND


class WorkQueueStats(NamedTuple):
    """Numbers of items and workers of one environment; times are in microseconds.

    Attributes:
        running: The number of items that are starting, active or stopping.
        read_at: The time for which the numbers hold.
    """

    depth: int
    pending: int
    oldest_queued_at: int | None
    workers_polling: int
    running: int
    stopped: int
    read_at: int

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON, without `read_at`."""
        numbers = self._asdict()
        del numbers["read_at"]
        oldest = self.oldest_queued_at
        text = None if oldest is None else format_time_with_whole_seconds(oldest)
        return {"type": WORK_QUEUE_STATS, **numbers, "oldest_queued_at": text}


class WorkQueue:
    """The items of one environment, with indexes by id, delivery and lease."""

    def __init__(self, environment_id: str) -> None:
        self.environment_id = environment_id
        self.leases = LeaseEndTimes()
        self.deliveries = Deliveries()
        self.waiting = WaitingPolls()
        self._items: dict[str, Item] = {}
        self._ids = AscendingIdList()
        self._undelivered = AscendingIdList()
        self._queued = self._stopped = 0
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._pollers: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get_item(self, work_id: str) -> Item:
        """Return an item; raises a 404 if its id is unknown or malformed."""
        item = self._items.get(work_id)
        if item is None:
            raise APIError(404, "no such work item in this environment")
        return item

    def is_current_item_version(self, item: Item) -> bool:
        """Return whether `item` is the current version, which no later change has replaced."""
        return self._items.get(item.id) is item

    def put_item(self, item: Item) -> None:
        """Add an item with the greatest id so far, or replace the earlier version of an item."""
        former = self._items.get(item.id)
        self._items[item.id] = item
        if former is None:
            self._ids.append(item.id)
        elif former.delivered_at is not None and former.delivered_at != item.delivered_at:
            self.deliveries.remove_delivery(item.id)
            self._recent.pop(item.id, None)
        was_queued = former is not None and former.state == QUEUED
        self._queued += (item.state == QUEUED) - was_queued
        was_stopped = former is not None and former.state == STOPPED
        self._stopped += (item.state == STOPPED) - was_stopped
        if item.lease_end is None:
            self.leases.remove_end_time(item.id)
        else:
            self.leases.set_end_time(item.id, item.lease_end)
        self._index_queued_item(item, former)

    def find_items_by_id(self, work_ids: Iterable[str]) -> list[Item]:
        """Return the items of this queue that have one of the ids `work_ids`."""
        return [self._items[work_id] for work_id in work_ids if work_id in self._items]

    def remove_item(self, work_id: str) -> None:
        """Remove an item, which must be stopped."""
        self._stopped -= self._items.pop(work_id).state == STOPPED
        self._ids.remove(work_id)

    def _index_queued_item(self, item: Item, former: Item | None) -> None:
        is_undelivered = _is_undelivered(item)
        if is_undelivered != (former is not None and _is_undelivered(former)):
            change = self._undelivered.insert if is_undelivered else self._undelivered.remove
            change(item.id)
        if item.delivered_at is not None and (
            former is None or former.delivered_at != item.delivered_at
        ):
            self.deliveries.add_delivery(item.id, item.delivered_at)
            self._recent[item.id] = item.delivered_at

    def find_oldest_claimable_item(self, delivered_until: int) -> Item | None:
        """Return the oldest item that a poll may claim; None: no such item.

        A poll may claim a queued item that is not delivered, or was delivered at the time
        `delivered_until` or earlier.
        """
        ids = (self._undelivered.lowest(), self.deliveries.lowest_due_id(delivered_until))
        oldest = min((work_id for work_id in ids if work_id is not None), default=None)
        return None if oldest is None else self._items[oldest]

    def list_items(
        self, limit: int, *, after: str = "", before: str | None = None
    ) -> Sequence[Item]:
        """Return up to `limit` items after or before the given id, in ascending order of ids."""
        walked = iterate_ids(self._ids, after=after, before=before)
        items = [self._items[work_id] for work_id in islice(walked, limit)]
        return items if before is None else items[::-1]

    def iterate_items(
        self, *, after: str = "", before: str | None = None, newest_first: bool = False
    ) -> Iterator[Item]:
        """Iterate over items between the ids `after` and `before` in the order of `iterate_ids`."""
        walked = iterate_ids(self._ids, after=after, before=before, newest_first=newest_first)
        return (self._items[work_id] for work_id in walked)

    def record_poll(self, worker_id: str, now: int) -> None:
        """Record the time of a worker's poll; the statistics count the workers that poll."""
        self._pollers[worker_id] = now
        self._pollers.move_to_end(worker_id)
        self._drop_entries_up_to_time(self._pollers, now - WORKERS_POLLING_WINDOW_SECONDS * SECOND)

    def compute_stats(self, now: int) -> WorkQueueStats:
        """Return the statistics of this queue at the time `now`."""
        self._drop_entries_up_to_time(self._recent, now - _WINDOW)
        self._drop_entries_up_to_time(self._pollers, now - WORKERS_POLLING_WINDOW_SECONDS * SECOND)
        ids = (self._undelivered.lowest(), self.deliveries.lowest_delivered_id())
        oldest = min((work_id for work_id in ids if work_id is not None), default=None)
        return WorkQueueStats(
            depth=self._queued - len(self._recent),
            pending=len(self._recent),
            oldest_queued_at=None if oldest is None else self._items[oldest].created_at,
            workers_polling=len(self._pollers),
            running=len(self._items) - self._queued - self._stopped,
            stopped=self._stopped,
            read_at=now,
        )

    @staticmethod
    def _drop_entries_up_to_time(entries: OrderedDict[str, int], until: int) -> None:
        while entries and next(iter(entries.values())) <= until:
            entries.popitem(last=False)


def _is_undelivered(item: Item) -> bool:
    return item.state == QUEUED and item.delivered_at is None
