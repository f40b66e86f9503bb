"""A clock that only the test moves."""

from __future__ import annotations


class ManualClock:
    """A clock whose time in seconds is `now`, which the test sets."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
