"""The ends of leases: a heap with one entry for each item, however many heartbeats it has had."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Leases:
    """The ends of the leases that are held."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}
        self._scheduled: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def hold(self, work_id: str, end: int) -> None:
        """Note that the item's lease ends at `end`.

        A later end leaves the entry where it is, to be put back when it comes up: a heap with an
        entry per heartbeat would grow with the heartbeats.
        """
        self._ends[work_id] = end
        if end < self._scheduled.get(work_id, end + 1):
            self._schedule(work_id, end)

    def drop(self, work_id: str) -> None:
        """Forget the item's lease."""
        self._ends.pop(work_id, None)

    def first(self) -> int | None:
        """Return an instant before which no lease ends; None when no lease is held."""
        return self._heap[0][0] if self._heap else None

    def lapsed(self, now: int) -> Iterator[str]:
        """Take out the items whose leases ended by `now`, in the order of their ends."""
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
                self._schedule(work_id, end)

    def _schedule(self, work_id: str, end: int) -> None:
        self._scheduled[work_id] = end
        heappush(self._heap, (end, work_id))
