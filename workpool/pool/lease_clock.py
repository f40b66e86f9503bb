"""The lease clock, and the detection of pauses of the machine.

Event loop clocks stop while a machine sleeps; the control plane's does not. Lease deadlines
therefore use a clock that counts sleep: a worker that wakes must notice that its leases are lost
before it sends anything. A paused, restored or cloned virtual machine stops that clock too; there,
only the wall clock shows that time has passed.
See workpool/docs/architecture.md, "Clocks".
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic clock; only differences mean anything."""

PAUSE_SECONDS = 2.0
"""The machine counts as paused if the wall clock moved this much against the lease clock."""


def _clock_that_counts_sleep() -> int | None:
    if hasattr(time, "CLOCK_BOOTTIME"):  # Linux
        return time.CLOCK_BOOTTIME
    # On macOS `time.monotonic` stands still during sleep, CLOCK_MONOTONIC does not.
    return time.CLOCK_MONOTONIC if sys.platform == "darwin" else None


_CLOCK_ID = _clock_that_counts_sleep()

# Not functions of ours: the clocks are read some forty times for each item.
lease_clock: Clock = (
    time.monotonic if _CLOCK_ID is None else functools.partial(time.clock_gettime, _CLOCK_ID)
)
"""Seconds since some moment in the past, sleep included."""
wall_clock: Clock = time.time  # noqa: TID251 - compared with the lease clock, never a deadline
"""Seconds since 1970 on the clock that people and time servers set."""


class PauseDetector:
    """Detects that the wall clock moved against the lease clock. May be used on any thread."""

    def __init__(self, clock: Clock, wall: Clock = wall_clock) -> None:
        self._clock = clock
        self._wall = wall

    def offset(self) -> float:
        """Return the seconds by which the wall clock is ahead of the lease clock."""
        return self._wall() - self._clock()

    def paused(self, since: float) -> bool:
        """Whether the machine was paused since `offset` returned the value `since`."""
        # Called for every write, and so without further calls.
        return abs(self._wall() - self._clock() - since) >= PAUSE_SECONDS
