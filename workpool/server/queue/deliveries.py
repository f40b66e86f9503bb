"""Which items wait for an acknowledgement, asked by the age of their delivery.

Every poll brings its own `reclaim_older_than_ms`, so "the oldest item delivered at least that long
ago" is a question about a prefix of the deliveries, answered in O(log n) by a tree of minima over
the places in order of delivery.
See workpool/docs/protocol.md, "Delivery".
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

_NOBODY: Final = "\x7f"
"""Greater than every id."""
_SMALLEST: Final = 64


class Deliveries:
    """Deliveries in the order of their times, which must never go back."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._rebuild([])

    def __len__(self) -> int:
        return len(self._places)

    def add(self, work_id: str, delivered_at: int) -> None:
        """Note that the item, not noted so far, was delivered."""
        if len(self._times) == self._size:
            self._rebuild([(self._times[place], key) for key, place in self._places.items()])
        place = len(self._times)
        self._times.append(delivered_at)
        self._places[work_id] = place
        self._set(place, work_id)

    def discard(self, work_id: str) -> None:
        """Forget the item's delivery."""
        self._set(self._places.pop(work_id), _NOBODY)

    def first(self) -> int | None:
        """When the oldest delivery was; None when there is none."""
        if not self._places:
            return None
        node = 1
        while node < self._size:
            node *= 2
            if self._least[node] == _NOBODY:
                node += 1
        return self._times[node - self._size]

    def oldest(self, until: int | None = None) -> str | None:
        """Return the lowest id among the deliveries up to `until`, all when None."""
        if until is None:
            found = self._least[1]
        else:
            found = self._least_before(bisect_right(self._times, until))
        return None if found == _NOBODY else found

    def _least_before(self, end: int) -> str:
        found, left, right = _NOBODY, self._size, self._size + end
        while left < right:
            if left & 1:
                found = min(found, self._least[left])
                left += 1
            if right & 1:
                right -= 1
                found = min(found, self._least[right])
            left //= 2
            right //= 2
        return found

    def _set(self, place: int, work_id: str) -> None:
        node = self._size + place
        self._least[node] = work_id
        while node > 1:
            node //= 2
            self._least[node] = min(self._least[2 * node], self._least[2 * node + 1])

    def _rebuild(self, deliveries: list[tuple[int, str]]) -> None:
        """Close the gaps, and leave as much room again: O(n), once every n additions."""
        deliveries.sort()
        self._size = _SMALLEST
        while self._size < 2 * len(deliveries):
            self._size *= 2
        self._times = [delivered_at for delivered_at, _ in deliveries]
        self._places = {work_id: place for place, (_, work_id) in enumerate(deliveries)}
        self._least = [_NOBODY] * (2 * self._size)
        self._least[self._size : self._size + len(deliveries)] = self._places
        for node in range(self._size - 1, 0, -1):
            self._least[node] = min(self._least[2 * node], self._least[2 * node + 1])
