"""How long to wait before the next try: exponential, with full jitter (design §2).

Pure arithmetic: it never sleeps and knows no clock, so whoever waits can be cancelled at leave.
"""

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds, drawn from 0 to a ceiling that doubles with every failure.

    Full jitter, because workers that lost the same control plane must not all come back at once.

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
        """How many delays were drawn since the last `reset()`."""

    def next(self) -> float:
        """Count one more failure and return how long to wait, in seconds."""
        # The exponent is bounded: after days of failures 2**n would not fit a float any more.
        ceiling = min(self._cap, self._initial * 2.0 ** min(self.failures, 64))
        self.failures += 1
        return self._rng() * ceiling

    def reset(self) -> None:
        """Start over; called after a success."""
        self.failures = 0
