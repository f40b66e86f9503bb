"""The share of polls without an item, over the last minute."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW_SECONDS: Final = 60


class NullWindow:
    """The numbers of item and null polls of the last 60 s, for each second. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # [second, nulls, polls]; an entry is overwritten after 60 s.
        self._buckets = [[-WINDOW_SECONDS, 0, 0] for _ in range(WINDOW_SECONDS)]

    def add(self, *, null: bool) -> None:
        """Count one item or null poll."""
        second = int(self._clock())
        with self._lock:
            bucket = self._buckets[second % WINDOW_SECONDS]
            if bucket[0] != second:
                bucket[:] = second, 0, 0
            bucket[1] += null
            bucket[2] += 1

    def counts(self) -> tuple[int, int]:
        """Return (nulls, polls) of the window."""
        oldest = int(self._clock()) - WINDOW_SECONDS
        with self._lock:
            live = [bucket for bucket in self._buckets if bucket[0] > oldest]
            return sum(bucket[1] for bucket in live), sum(bucket[2] for bucket in live)
