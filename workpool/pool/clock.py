"""The clock that leases are measured on, and what tells that the machine was paused.

Event loop clocks stop while a machine sleeps; the control plane's does not. Lease deadlines
therefore use a clock that counts sleep: a woken worker must notice that its leases are gone before
it sends anything. A paused, restored or cloned virtual machine stops that clock too; there, only
the wall clock tells that time has passed.
See docs/architecture.md, "Clocks".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic clock; only differences mean anything."""

PAUSE_SECONDS = 2.0
"""A wall clock that moved this much against the lease clock: the machine was paused."""


def _clock_that_counts_sleep() -> int | None:
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.CLOCK_BOOTTIME
    # On macOS `time.monotonic` stands still during sleep, CLOCK_MONOTONIC does not.
    return time.CLOCK_MONOTONIC if sys.platform == "darwin" else None


_CLOCK_ID = _clock_that_counts_sleep()


def lease_clock() -> float:
    """Seconds since some moment in the past, sleep included."""
    return time.monotonic() if _CLOCK_ID is None else time.clock_gettime(_CLOCK_ID)


def wall_clock() -> float:
    """Seconds since 1970 on the clock that people and time servers set."""
    return time.time()  # noqa: TID251 - compared with the lease clock, never used as a deadline


class PauseDetector:
    """Notices that the wall clock moved against the lease clock. For one thread."""

    def __init__(self, clock: Clock, wall: Clock = wall_clock) -> None:
        self._clock = clock
        self._wall = wall
        self._offset = wall() - clock()

    def paused(self) -> bool:
        """Whether the clocks moved against each other by `PAUSE_SECONDS` since the last call."""
        offset = self._wall() - self._clock()
        moved = abs(offset - self._offset) >= PAUSE_SECONDS
        self._offset = offset
        return moved
