"""The one clock that leases are measured on, for both threads (design §1, Lease before work).

Loop clocks stop while a machine sleeps; the control plane's does not. So lease deadlines use
CLOCK_BOOTTIME where it exists: a woken worker must notice that its leases are gone before it sends
anything.
"""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic clock; only differences mean anything."""

if hasattr(time, "CLOCK_BOOTTIME"):

    def lease_clock() -> float:
        """Seconds since boot, sleep included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:

    def lease_clock() -> float:
        """Seconds on the platform's monotonic clock."""
        return time.monotonic()
