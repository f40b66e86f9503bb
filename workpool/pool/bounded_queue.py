"""The bounded queue between pollers and handler slots.

There are `concurrency` slots to run in and `prefetch` places to wait in. A poller reserves a place
*before* it polls, so the pool never receives an item that it has no room for. The queue counts
places; it decides nothing about items. Used on the handlers' loop only; the counts may be read on
any thread.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """Places for items. A place is free, reserved (by a poll), waiting (an item) or running.

    Args:
        concurrency: The number of slots.
        prefetch: The number of places to wait in.
        uses: The number of items that may use a place up; after that no place is left. None: no
            limit.
    """

    def __init__(self, concurrency: int, prefetch: int, uses: int | None = None) -> None:
        places = concurrency + prefetch
        self.concurrency = concurrency
        self._uses = places if uses is None else uses
        self.capacity = min(places, self._uses)
        self.reserved = 0
        self.running = 0
        self._waiting: deque[T] = deque()
        self._reservers: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """The number of items that wait for a slot."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether an item is in every place; places that polls have reserved do not count."""
        return self.running + len(self._waiting) >= self.capacity

    @property
    def idle(self) -> bool:
        """Whether no item waits or runs."""
        return not self._waiting and not self.running

    def _free(self) -> int:
        return self.capacity - self.reserved - self.running - len(self._waiting)

    async def reserve(self) -> None:
        """Reserve a place; wait until one is free, in the order of the calls."""
        if self._free() > 0 and not self._reservers:
            self.reserved += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reservers.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.unreserve()  # granted and cancelled in one turn: the place must not be lost
            elif turn in self._reservers:  # else `_grant` has removed it already
                self._reservers.remove(turn)
            raise

    def unreserve(self) -> None:
        """Free a reserved place."""
        self.reserved -= 1
        self._grant()

    def put(self, item: T) -> None:
        """Put an item into a reserved place, to wait for a slot."""
        self.reserved -= 1
        self._waiting.append(item)

    def take(self) -> T | None:
        """Move the oldest waiting item into a slot; None if no item waits or no slot is free."""
        if not self._waiting or self.running >= self.concurrency:
            return None
        self.running += 1
        return self._waiting.popleft()

    def release(self, *, used_up: bool = False) -> None:
        """Free the slot, and with it the place, of an item that `take` returned.

        `used_up`: the item counts as one of the `uses`.
        """
        self.running -= 1
        if used_up:
            self._uses -= 1
            self.capacity = min(self.capacity, self._uses)
        self._grant()

    def forget_waiting(self) -> list[T]:
        """Remove and return the waiting items, which the control plane will deliver again."""
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
