"""The clocks of the pool, and the detection of pauses of the machine.

Event loop clocks stop while a machine sleeps; the control plane's does not. Deadlines of leases
therefore use a clock that counts sleep: a worker that wakes must notice that its leases are lost
before it sends anything. A paused, restored or cloned virtual machine stops that clock too; there,
only the wall clock shows that time has passed. See workpool/docs/architecture.md, "Clocks".
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""A clock: returns its time in seconds."""

PAUSE_SECONDS = 2.0
"""The machine counts as paused if the two clocks moved apart by this many seconds."""


def choose_suspend_aware_clock() -> Clock:
    """Return this platform's monotonic clock that goes on while the machine sleeps.

    The result is the platform's own function: a wrapper would cost some forty calls for each
    item.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):  # Only Linux has this clock.
        return functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if sys.platform == "darwin":  # On macOS, `time.monotonic` stands still during sleep.
        return functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    return time.monotonic


lease_clock: Clock = choose_suspend_aware_clock()
"""Seconds on a clock that counts sleep, since an arbitrary moment."""
wall_clock: Clock = time.time  # noqa: TID251 - compared with the lease clock, never a deadline
"""Seconds since 1970 on the clock that people and time servers set."""


class MachinePauseDetector:
    """Detects pauses of the machine, in which the wall clock runs and the lease clock does not.

    May be used on any thread.
    """

    def __init__(self, clock: Clock, wall: Clock = wall_clock) -> None:
        self._clock = clock
        self._wall = wall

    def wall_clock_offset(self, now: float | None = None) -> float:
        """Return the seconds by which the wall clock is ahead of the lease clock.

        `now` is the lease clock's time if the caller has just read it.
        """
        return self._wall() - (self._clock() if now is None else now)

    def was_machine_paused(self, since: float, now: float | None = None) -> bool:
        """Return whether the machine was paused after an earlier call of `wall_clock_offset`.

        `since` is the value that this call returned.
        """
        return abs(self.seconds_missed_by_lease_clock(since, now)) >= PAUSE_SECONDS

    def seconds_missed_by_lease_clock(self, since: float, now: float | None = None) -> float:
        """Return by how many seconds the wall clock has got ahead of the lease clock.

        The time is measured from the call in which `wall_clock_offset` returned `since`. The result
        is negative if the wall clock was set back.
        """
        return self._wall() - (self._clock() if now is None else now) - since
