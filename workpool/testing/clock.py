"""The control plane's clock, in a test's hands: leases and redeliveries without the waiting."""

from __future__ import annotations

from workpool.server.clock import system_clock


class Clock:
    """Epoch seconds that go on as time does, and jump when told: `ControlPlane(now=Clock())`.

    Ahead of the worker's clock it makes leases lapse early; polls that wait already notice a jump
    after `plane.operations.wake()`.
    """

    def __init__(self) -> None:
        self._steady = system_clock()
        self._ahead = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self._steady() + self._ahead

    def advance(self, seconds: float) -> None:
        """Jump forward; what is negative is a step back, which the control plane ignores."""
        self._ahead += seconds
