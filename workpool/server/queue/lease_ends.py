"""The ends of leases, in a heap that does not grow with the number of heartbeats."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class LeaseEndTimes:
    """The ends of the current leases of one environment, earliest first."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}
        self._scheduled: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def set_end_time(self, work_id: str, end: int) -> None:
        """Set the time at which the lease of an item ends.

        If the end is later than before, the heap's entry stays, and is moved only when it becomes
        the first: with one entry for each heartbeat, the heap would grow.
        """
        self._ends[work_id] = end
        if end < self._scheduled.get(work_id, end + 1):
            self._schedule_end_time(work_id, end)

    def remove_end_time(self, work_id: str) -> None:
        """Remove the lease of an item, if there is one."""
        self._ends.pop(work_id, None)

    def earliest_end(self) -> int | None:
        """Return a time before which no lease ends; None if there are no leases."""
        return self._heap[0][0] if self._heap else None

    def pop_expired_leases(self, now: int) -> Iterator[str]:
        """Remove the leases that ended by `now`, and yield their item ids in order of lease end."""
        while self._heap and self._heap[0][0] <= now:
            at, work_id = heappop(self._heap)
            if self._scheduled.get(work_id) != at:
                continue
            del self._scheduled[work_id]
            end = self._ends.get(work_id)
            if end == at:
                del self._ends[work_id]
                yield work_id
            elif end is not None:
                self._schedule_end_time(work_id, end)

    def _schedule_end_time(self, work_id: str, end: int) -> None:
        self._scheduled[work_id] = end
        heappush(self._heap, (end, work_id))
