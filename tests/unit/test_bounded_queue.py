"""The bounded queue: its places are never lost, never used twice, and granted in order."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.unit.event_loops import run_ready_tasks
from workpool.pool.bounded_queue import BoundedQueue


async def put_items(queue: BoundedQueue[str], *items: str) -> None:
    for item in items:
        await queue.reserve()
        queue.put(item)


async def test_queue_returns_items_in_order_of_arrival() -> None:
    queue: BoundedQueue[str] = BoundedQueue(3, 0)
    await put_items(queue, "a", "b", "c")
    assert [queue.take(), queue.take(), queue.take(), queue.take()] == ["a", "b", "c", None]


async def test_queue_runs_no_more_items_than_slots() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 2)
    await put_items(queue, "a", "b", "c")
    assert queue.take() == "a"
    assert queue.take() is None
    assert (queue.running, queue.waiting) == (1, 2)
    queue.release()
    queue.grant()
    assert queue.take() == "b"


async def test_reservation_waits_until_place_is_free() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    await put_items(queue, "a", "b")
    assert queue.take() == "a"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve())
        await run_ready_tasks()
        assert not waiting.done()
        queue.release()
        queue.grant()
    assert queue.reserved == 1


async def test_released_place_goes_to_first_waiter() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve()
    order: list[str] = []

    async def record_reservation(name: str) -> None:
        await queue.reserve()
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(record_reservation("first"))
        group.create_task(record_reservation("second"))
        await run_ready_tasks()
        queue.unreserve()
        await run_ready_tasks()
        assert order == ["first"]
        queue.unreserve()
    assert order == ["first", "second"]
    assert queue.reserved == 1


async def test_new_reservation_waits_behind_earlier_waiters() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve())
        await run_ready_tasks()
        queue.unreserve()  # The place is granted, but the first waiter has not run yet.
        late = group.create_task(queue.reserve())
        await run_ready_tasks()
        assert first.done()
        assert not late.done()
        queue.unreserve()


async def test_cancelled_reservation_passes_its_place_to_next_waiter() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve())
        second = group.create_task(queue.reserve())
        await run_ready_tasks()
        first.cancel()
        await run_ready_tasks()
        queue.unreserve()
        await second
    assert queue.reserved == 1


async def test_place_granted_to_reservation_cancelled_at_once_is_not_lost() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve())
        second = group.create_task(queue.reserve())
        await run_ready_tasks()
        queue.unreserve()  # The first waiter is granted the place and cancelled before it runs.
        first.cancel()
        await second
    assert first.cancelled()
    assert queue.reserved == 1


async def test_dropped_items_free_their_places_and_wake_waiters() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 2)
    await put_items(queue, "a", "b", "c")
    queue.take()
    async with asyncio.TaskGroup() as group:
        group.create_task(queue.reserve())
        await run_ready_tasks()
        assert queue.forget_waiting() == ["b", "c"]
    assert (queue.waiting, queue.reserved, queue.running) == (0, 1, 1)


@pytest.mark.parametrize(
    ("items", "taken", "full", "idle"),
    [(0, 0, False, True), (1, 0, False, False), (1, 1, False, False), (2, 1, True, False)],
)
async def test_queue_full_and_idle_flags_ignore_reservations(
    items: int, taken: int, *, full: bool, idle: bool
) -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    await put_items(queue, *("ab"[:items]))
    for _ in range(taken):
        queue.take()
    assert (queue.full, queue.idle) == (full, idle)
    if not full:
        await queue.reserve()
        assert (queue.full, queue.idle) == (full, idle)


async def test_reservation_cancelled_while_a_place_becomes_free_raises_cancelled_error() -> None:
    """A poller that is cancelled by a drain must not continue to poll."""
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve())
        await run_ready_tasks()
        waiting.cancel()
        queue.unreserve()
        await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert queue.reserved == 0


async def test_slot_discarded_after_its_last_use_stays_unavailable() -> None:
    queue: BoundedQueue[int] = BoundedQueue(2, 1, uses=2)
    assert queue.capacity == 2
    for used_up in (False, True):
        await queue.reserve()
        queue.put(1)
        assert queue.take() == 1
        queue.release(used_up=used_up)
    assert queue.capacity == 1
    await queue.reserve()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve())
        await run_ready_tasks()
        assert not waiting.done()
        queue.put(2)
        assert queue.take() == 2
        assert queue.full
        queue.release(used_up=True)
        await run_ready_tasks()
        assert not waiting.done()
        assert (queue.capacity, queue.full, queue.idle) == (0, True, True)
        waiting.cancel()


class RandomQueueUsers:
    """Tasks that reserve and release the places of one queue at random."""

    def __init__(self, dice: random.Random, queue: BoundedQueue[int]) -> None:
        self.dice = dice
        self.queue = queue

    async def random_pause(self) -> None:
        for _ in range(self.dice.randrange(4)):
            await asyncio.sleep(0)

    async def use_one_place(self, number: int) -> None:
        await self.queue.reserve()
        try:
            await self.random_pause()
        except asyncio.CancelledError:
            self.queue.unreserve()
            raise
        if self.dice.random() < 0.5:
            self.queue.unreserve()
            return
        self.queue.put(number)
        if self.queue.take() is not None:
            try:
                await self.random_pause()
            finally:
                self.queue.release()
                self.queue.grant()


@pytest.mark.parametrize("seed", range(20))
async def test_queue_under_random_use_and_cancellation_loses_no_place(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - repeatable, guards nothing
    queue: BoundedQueue[int] = BoundedQueue(2, dice.randrange(3))
    users, tasks = RandomQueueUsers(dice, queue), list[asyncio.Task[None]]()
    async with asyncio.TaskGroup() as group:
        for number in range(200):
            tasks.append(group.create_task(users.use_one_place(number)))
            await users.random_pause()
            if dice.random() < 0.4:
                dice.choice(tasks).cancel()
            assert queue.reserved + queue.running + queue.waiting <= queue.capacity
            assert queue.running <= queue.concurrency
        while not all(task.done() for task in tasks):
            queue.forget_waiting()
            await asyncio.sleep(0)
    assert {task.cancelled() for task in tasks} == {True, False}
    queue.forget_waiting()
    assert (queue.reserved, queue.running, queue.waiting) == (0, 0, 0)
    async with asyncio.timeout(1):
        for _ in range(queue.capacity):
            await queue.reserve()


async def test_item_set_aside_occupies_no_place() -> None:
    queue: BoundedQueue[str] = BoundedQueue(2, 0)
    await queue.reserve()
    queue.unreserve()
    queue.set_aside("a")
    await queue.reserve()
    await queue.reserve()
    assert (queue.reserved, queue.waiting, queue.idle) == (2, 0, False)


async def test_queue_sets_aside_no_more_items_than_places() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    queue.set_aside("a")
    assert not queue.aside_full
    queue.set_aside("b")
    assert queue.aside_full


async def test_item_waiting_for_its_handler_starts_before_item_waiting_for_any_slot() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    queue.set_aside("a")
    queue.set_aside("b")
    await put_items(queue, "c")
    queue.may_start = lambda item: item != "a"
    assert queue.take() == "b"
    assert (queue.aside, queue.waiting, queue.running) == (["a"], 1, 1)


async def test_released_place_goes_to_item_set_aside_before_a_poller() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await put_items(queue, "a")
    assert queue.take() == "a"
    queue.set_aside("b")
    async with asyncio.TaskGroup() as group:
        poller = group.create_task(queue.reserve())
        await run_ready_tasks()
        queue.release()
        assert queue.take() == "b"
        queue.grant()
        await run_ready_tasks()
        assert not poller.done()
        queue.release()
        queue.grant()
    assert queue.reserved == 1


async def test_wait_for_room_aside_ends_when_item_set_aside_starts() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    queue.set_aside("a")
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.room_aside(3600))
        await run_ready_tasks()
        assert not waiting.done()
        assert queue.take() == "a"
