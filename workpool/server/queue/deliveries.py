"""The delivered items that are not yet acknowledged, in order of their deliveries.

Every poll brings its own `reclaim_older_than_ms`, and receives the item with the lowest id among
those that were delivered at least that long ago.
See workpool/docs/protocol.md, "Delivery".
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from itertools import chain


class Deliveries:
    """The ids of delivered items, the earliest delivery first."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, int] = OrderedDict()
        # The ids and delivery times of the items that were due at no poll yet, because the reclaim
        # window of each poll was longer than the time since their delivery.
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._due: list[str] = []  # the ids of the other delivered items, in ascending order

    def __len__(self) -> int:
        return len(self._times)

    def add_delivery(self, work_id: str, delivered_at: int) -> None:
        """Record the delivery of an item, which must not have a recorded delivery yet."""
        self._times[work_id] = self._recent[work_id] = delivered_at

    def remove_delivery(self, work_id: str) -> None:
        """Remove the delivery of an item."""
        del self._times[work_id]
        if self._recent.pop(work_id, None) is None:
            del self._due[bisect_left(self._due, work_id)]

    def oldest_delivery_time(self) -> int | None:
        """Return the time of the oldest delivery; None if there is none."""
        return next(iter(self._times.values()), None)

    def lowest_delivered_id(self) -> str | None:
        """Return the lowest id of all delivered items; None if there is none."""
        return min(chain(self._due[:1], self._recent), default=None)

    def lowest_due_id(self, until: int) -> str | None:
        """Return the lowest id of the items that were delivered at the time `until` or earlier.

        Return None if there is no such item. Each id moves once from `_recent` to the sorted list
        `_due`. The result is the first id of `_due`, unless an earlier poll with a shorter reclaim
        window has moved ids of items that were delivered after `until`.
        """
        oldest = self.oldest_delivery_time()
        if oldest is None or oldest > until:
            return None
        while self._recent and next(iter(self._recent.values())) <= until:
            work_id, _ = self._recent.popitem(last=False)
            insort(self._due, work_id)
        return next(work_id for work_id in self._due if self._times[work_id] <= until)
