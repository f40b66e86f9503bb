"""Delays between retries: exponential, with full jitter.

Computes only. It neither sleeps nor reads a clock, so the caller's wait can be cancelled.
"""

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds, drawn between 0 and a ceiling that doubles with each failure.

    Full jitter prevents workers that lost the same control plane from returning all at once.

    Args:
        initial: The ceiling of the first delay, in seconds.
        cap: The ceiling that no delay exceeds, in seconds.
        rng: Draws a number from 0 (included) to 1 (excluded).
    """

    __slots__ = ("_cap", "_initial", "_rng", "failures")

    def __init__(
        self, initial: float, cap: float, rng: Callable[[], float] = random.random
    ) -> None:
        self._initial = initial
        self._cap = cap
        self._rng = rng
        self.failures = 0
        """The number of delays since the last `reset()`."""

    def next_delay(self) -> float:
        """Record one more failure, and return the random delay before the next try, in seconds."""
        # Bound the exponent: after days of failures, `2.0 ** failures` would overflow.
        ceiling = min(self._cap, self._initial * 2.0 ** min(self.failures, 64))
        self.failures += 1
        return self._rng() * ceiling

    def reset(self) -> None:
        """Begin with the shortest delay again, because a try succeeded."""
        self.failures = 0
