"""The bounded queue between pollers and handler slots.

There are `concurrency` slots to run in and `prefetch` places to wait in. A poller reserves a place
*before* it polls, so the pool never receives an item that it has no room for. An item whose
handler has no slot is set aside: it occupies no place, so pollers go on to items of other handlers.
The queue orders the items, and starts those that were set aside; the dispatcher decides whether an
item may start. Used on the handlers' loop only; the counts may be read on any thread.
See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.pool.shared_slots import SlotShare

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """The queue of one pool: each of its places is free, reserved for a poll, or has an item.

    An item in a place waits for a slot, or runs in one.

    Args:
        concurrency: The number of slots.
        prefetch: The number of places to wait in.
        uses: The number of items that the pool may run in all; there are never more places than
            items left to run. None: no limit.
        share: The pool's share of slots that several pools use; each place needs one of these
            slots. None: the slots are the pool's own.

    Attributes:
        may_start: Returns whether an item that was set aside may start now.
        start: Called with an item that was set aside and has just got a shared slot.
    """

    def __init__(
        self,
        concurrency: int,
        prefetch: int,
        uses: int | None = None,
        share: SlotShare | None = None,
    ) -> None:
        places = concurrency + prefetch
        self.concurrency = concurrency
        self._uses = places if uses is None else uses
        self.capacity = min(places, self._uses)
        self.reserved = 0
        self.running = 0
        self._waiting: deque[T] = deque()
        self._aside: list[T] = []
        self._room = asyncio.Event()
        self._reservers: deque[asyncio.Future[None]] = deque()
        self.may_start: Callable[[T], bool] = lambda _: True
        self.start: Callable[[T], None] = lambda _: None
        self._share = share
        if share is not None:
            share.next_use = self._choose_use_of_shared_slot

    @property
    def free_slot_count(self) -> int:
        """The number of slots that this pool could use now if no other pool takes them first."""
        free = max(0, self.concurrency - self.running)
        if self._share is None:
            return free
        return min(free, self.reserved + self._share.available_slots)

    @property
    def waiting_item_count(self) -> int:
        """The number of items that wait in the queue's places until a slot is free.

        Items set aside are not counted, because they have no place.
        """
        return len(self._waiting)

    @property
    def items_set_aside(self) -> list[T]:
        """A copy of the list of items set aside until their handler has a slot, oldest first."""
        return self._aside.copy()

    @property
    def is_full(self) -> bool:
        """Whether every place holds an item. A reserved place that has no item yet counts as free.

        With shared slots, the queue is also full if the pool has an item and no reserved place, and
        cannot take another slot, because other pools have taken them.
        """
        items = self.running + len(self._waiting)
        if self._share is None or not items:
            return items >= self.capacity
        return items >= self.capacity or not (self.reserved or self._share.available_slots)

    @property
    def is_idle(self) -> bool:
        """Whether the pool has no item: none waits and none runs."""
        return not self._waiting and not self._aside and not self.running

    def _count_free_places(self) -> int:
        return self.capacity - self.reserved - self.running - len(self._waiting)

    async def reserve_place(self) -> None:
        """Wait until a place of the queue is free, and reserve it; the first caller goes first."""
        if (
            self._count_free_places() > 0
            and not self._reservers
            and (self._share is None or self._share.take_slot())
        ):
            self.reserved += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reservers.append(turn)
        if self._share is not None:
            # A shared slot may be free already. If so, this call gives it to an item that was set
            # aside and may start now, or else to the poller that has waited longest.
            self._share.grant_free_slots()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # The place was granted just before the cancellation: free it, or nobody could use
                # it again.
                self.release_reserved_place()
            # `give_free_places_to_pollers` may have removed the cancelled future already.
            elif turn in self._reservers:
                self._reservers.remove(turn)
            raise

    def release_reserved_place(self) -> None:
        """Free a place that was reserved for a poll and got no item."""
        self.reserved -= 1
        if self._share is not None:
            self._share.return_slot()
        self.give_free_places_to_pollers()

    def put_item(self, item: T) -> None:
        """Put an item into a reserved place, to wait for a slot."""
        self.reserved -= 1
        self._waiting.append(item)

    def set_item_aside(self, item: T) -> None:
        """Store an item outside of the queue's places until its handler has a free slot."""
        self._aside.append(item)
        if self.too_many_items_set_aside:
            self._room.clear()

    @property
    def too_many_items_set_aside(self) -> bool:
        """Whether at least as many items are set aside as the queue has places.

        Items set aside wait outside the queue's places until their handler has a free slot. If so
        many are set aside, the pool should poll more slowly, so that other workers get items.
        """
        return len(self._aside) >= self.capacity

    def remove_item_set_aside(self, item: T) -> None:
        """Remove an item that was set aside."""
        self._aside.remove(item)
        if not self.too_many_items_set_aside:
            self._room.set()

    async def wait_while_too_many_items_set_aside(self, seconds: float) -> None:
        """Wait, for `seconds` at most, until `too_many_items_set_aside` is false."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._room.wait()

    def take_startable_item(self) -> T | None:
        """Move an item into a slot, and return it; None if no item may start or no slot is free.

        Items that were set aside and may start now have precedence over items in places.
        """
        if self.running >= self.concurrency:
            return None
        item = self._find_next_startable_item() if self._aside else None
        if item is not None and (self._share is None or self._share.take_slot()):
            self._move_item_to_slot(item)
            return item
        if not self._waiting:
            return None
        self.running += 1
        return self._waiting.popleft()

    def _find_next_startable_item(self) -> T | None:
        """Return the oldest of the items set aside that may start.

        None: none of them may start, or the queue has no free place or no free slot.
        """
        if self._aside and self.running < self.concurrency and self._count_free_places() > 0:
            return next(filter(self.may_start, self._aside), None)
        return None

    def _move_item_to_slot(self, item: T) -> None:
        """Remove an item from the items set aside, and count it as running in a slot."""
        self.remove_item_set_aside(item)
        self.running += 1

    def release_slot(self, *, used_up: bool = False) -> None:
        """Free the slot of an item that `take_startable_item` returned, because the item has ended.

        The caller then offers the slot to waiting items (`take_startable_item`), and after them the
        free place to pollers (`give_free_places_to_pollers`).
        `used_up`: the item counts towards the limit `uses`.
        """
        self.running -= 1
        if self._share is not None:
            self._share.return_slot(used_up=used_up)
        if used_up:
            self._uses -= 1
            self.capacity = min(self.capacity, self._uses)

    def forget_waiting_items(self) -> list[T]:
        """Remove and return the waiting items, which the control plane will deliver again."""
        forgotten = [*self._waiting, *self._aside]
        if self._share is not None:
            for _ in self._waiting:
                self._share.return_slot()
        self._waiting.clear()
        self._aside.clear()
        self._room.set()
        self.give_free_places_to_pollers()
        return forgotten

    def give_free_places_to_pollers(self) -> None:
        """Give the free places of the queue to the pollers that wait in `reserve_place`."""
        if self._share is not None:
            self._share.grant_free_slots()
            return
        while self._reservers and self._count_free_places() > 0:
            self._give_place_to_poller()

    def _give_place_to_poller(self) -> None:
        """Give a free place to the poller that has waited longest, if it still waits."""
        turn = self._reservers.popleft()
        if not turn.done():
            self.reserved += 1
            turn.set_result(None)

    def _choose_use_of_shared_slot(self) -> Callable[[], None] | None:
        """Return a function that uses one more shared slot; None if the pool could not use one now.

        The caller grants the slot to the pool, and then calls the function. The function starts an
        item that was set aside. If no such item may start, it lets a waiting poller poll.
        """
        item = self._find_next_startable_item()
        if item is not None:
            return partial(self._start_item_in_shared_slot, item)
        # Skip pollers that were cancelled while they waited for a place.
        while self._reservers and self._reservers[0].done():
            del self._reservers[0]
        return (
            self._give_place_to_poller
            if self._reservers and self._count_free_places() > 0
            else None
        )

    def _start_item_in_shared_slot(self, item: T) -> None:
        """Start an item that was set aside, in a slot that several pools share.

        The slot has just been granted to this pool.
        """
        self._move_item_to_slot(item)
        self.start(item)
