"""The bounded queue between pollers and handler slots.

Owns the count of places, never the items' fate. There are `concurrency` slots to run in and
`prefetch` places to wait in; a poller reserves a place *before* it polls, so the pool never claims
what it cannot start (design §1, Claim). Used on the supervisor's loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """Places for items: free, reserved (by a poll under way), waiting, or running."""

    def __init__(self, concurrency: int, prefetch: int) -> None:
        self.concurrency = concurrency
        self.capacity = concurrency + prefetch
        self.reserved = 0
        self.running = 0
        self._waiting: deque[T] = deque()
        self._reservers: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Items delivered and not yet taken by a slot."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Every place is taken by an item; polls under way do not count."""
        return self.running + len(self._waiting) >= self.capacity

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self.running

    def _free(self) -> int:
        return self.capacity - self.reserved - self.running - len(self._waiting)

    async def reserve(self) -> None:
        """Take a place, waiting in turn until one is free."""
        if self._free() > 0 and not self._reservers:
            self.reserved += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reservers.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.unreserve()  # granted and cancelled at once: the place must not be lost
            elif turn in self._reservers:  # a place that came meanwhile has passed it over
                self._reservers.remove(turn)
            raise

    def unreserve(self) -> None:
        """Give a reserved place back."""
        self.reserved -= 1
        self._grant()

    def put(self, item: T) -> None:
        """Turn a reserved place into a waiting item."""
        self.reserved -= 1
        self._waiting.append(item)

    def take(self) -> T | None:
        """Move the oldest waiting item into a slot; None when nothing waits or no slot is free."""
        if not self._waiting or self.running >= self.concurrency:
            return None
        self.running += 1
        return self._waiting.popleft()

    def release(self) -> None:
        """Free the slot, and with it the place, of an item that `take` returned."""
        self.running -= 1
        self._grant()

    def forget_waiting(self) -> list[T]:
        """Empty the queue; the items were never acknowledged and come back by themselves."""
        forgotten = list(self._waiting)
        self._waiting.clear()
        self._grant()
        return forgotten

    def _grant(self) -> None:
        while self._reservers and self._free() > 0:
            turn = self._reservers.popleft()
            if not turn.done():
                self.reserved += 1
                turn.set_result(None)
