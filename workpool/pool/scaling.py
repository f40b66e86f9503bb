"""How many of the pollers poll: one listens while nothing comes, more join while items come.

An empty queue needs one poll in flight to notice the next item at once; every other one is a
request per `block_ms` for nothing. Poller *i* polls while *i* < `target`. A pool that starts does
not know what awaits it, and looks with all of them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from workpool.events import PollersScaled

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import ScaleDirection, ScaleReason


class Scaling:
    """Moves the target with each answered poll: additive up, down by one, halved on a 429.

    Args:
        limit: The setting `pollers`.
        observe: Told of every change.

    Attributes:
        target: Pollers that should be polling now; at least 1, at most `limit`.
    """

    def __init__(self, limit: int, observe: Callable[[PollersScaled], None]) -> None:
        self.target = limit
        self._observe = observe
        self._turns = [asyncio.Event() for _ in range(limit)]
        for turn in self._turns:
            turn.set()

    async def turn(self, number: int) -> None:
        """Wait until poller `number` (from 0) is among those that poll."""
        await self._turns[number].wait()

    def has_turn(self, number: int) -> bool:
        """Whether `turn` would return at once."""
        return number < self.target

    def hit(self) -> None:
        """A poll brought an item: there may be more."""
        self._aim(self.target + 1, "hits")

    def null(self) -> None:
        """A poll brought nothing."""
        self._aim(self.target - 1, "nulls")

    def throttled(self) -> None:
        """A poll was answered 429."""
        self._aim(self.target // 2, "throttled")

    def _aim(self, wanted: int, reason: ScaleReason) -> None:
        target = max(1, min(wanted, len(self._turns)))
        if target == self.target:
            return
        direction: ScaleDirection = "up" if target > self.target else "down"
        self.target = target
        for number, turn in enumerate(self._turns):
            if number < target:
                turn.set()
            else:
                turn.clear()
        self._observe(PollersScaled(direction, reason, target))
