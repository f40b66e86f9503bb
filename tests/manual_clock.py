"""A clock that only the test moves."""

from __future__ import annotations


class ManualClock:
    """A clock whose time in seconds is `now`; the test advances it."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Advance the clock by `seconds`; a negative number sets it back."""
        self.now += seconds
