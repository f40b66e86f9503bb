"""A clock for the control plane that a test can advance, so that leases lapse without a wait."""

from __future__ import annotations

from workpool.server.timestamps import system_clock


class Clock:
    """Epoch seconds that pass in real time and can jump: `ControlPlane(now=Clock())`.

    A clock ahead of the worker's clock makes leases lapse early. Polls that are waiting notice a
    jump after `plane.operations.wake_all_polls()`.
    """

    def __init__(self) -> None:
        self._steady = system_clock()
        self._ahead = 0.0

    def __call__(self) -> float:
        """Return the current epoch seconds."""
        return self._steady() + self._ahead

    def advance(self, seconds: float) -> None:
        """Advance the clock; the control plane ignores a step back (a negative number)."""
        self._ahead += seconds
