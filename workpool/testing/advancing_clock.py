"""A clock for the control plane that a test can advance, so that leases lapse without a wait."""

from __future__ import annotations

from workpool.server.timestamps import make_system_clock


class Clock:
    """A clock for `ControlPlane(now=Clock())` that runs at normal speed and can be advanced.

    A clock ahead of the worker's clock makes leases lapse early. Polls that are waiting notice an
    advanced clock after `plane.operations.wake_all_polls()`.
    """

    def __init__(self) -> None:
        self._steady = make_system_clock()
        self._ahead = 0.0

    def __call__(self) -> float:
        """Return the time of this clock, in seconds since the epoch."""
        return self._steady() + self._ahead

    def advance(self, seconds: float) -> None:
        """Advance the clock by `seconds`.

        A negative number sets the clock back; the control plane then keeps its latest time.
        """
        self._ahead += seconds
