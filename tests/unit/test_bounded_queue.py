"""The bounded queue: no place is lost or used twice, and tasks get places in order of arrival."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.unit.event_loops import run_ready_tasks
from workpool.pool.bounded_queue import BoundedQueue


async def reserve_places_and_put_items(queue: BoundedQueue[str], *items: str) -> None:
    for item in items:
        await queue.reserve_place()
        queue.put_item(item)


async def test_queue_returns_items_in_order_of_arrival() -> None:
    queue: BoundedQueue[str] = BoundedQueue(3, 0)
    await reserve_places_and_put_items(queue, "a", "b", "c")
    assert [
        queue.take_startable_item(),
        queue.take_startable_item(),
        queue.take_startable_item(),
        queue.take_startable_item(),
    ] == [
        "a",
        "b",
        "c",
        None,
    ]


async def test_queue_runs_no_more_items_than_slots() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 2)
    await reserve_places_and_put_items(queue, "a", "b", "c")
    assert queue.take_startable_item() == "a"
    assert queue.take_startable_item() is None
    assert (queue.running, queue.waiting_item_count) == (1, 2)
    queue.release_slot()
    queue.give_free_places_to_pollers()
    assert queue.take_startable_item() == "b"


async def test_reservation_of_queue_place_waits_until_one_is_free() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    await reserve_places_and_put_items(queue, "a", "b")
    assert queue.take_startable_item() == "a"
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert not waiting.done()
        queue.release_slot()
        queue.give_free_places_to_pollers()
    assert queue.reserved == 1


async def test_released_queue_place_goes_to_first_waiting_task() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve_place()
    order: list[str] = []

    async def reserve_place_and_record_waiter(name: str) -> None:
        await queue.reserve_place()
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(reserve_place_and_record_waiter("first"))
        group.create_task(reserve_place_and_record_waiter("second"))
        await run_ready_tasks()
        queue.release_reserved_place()
        await run_ready_tasks()
        assert order == ["first"]
        queue.release_reserved_place()
    assert order == ["first", "second"]
    assert queue.reserved == 1


async def test_new_reservation_of_queue_place_waits_behind_earlier_waiters() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve_place()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        # The release gives the place to the first waiter, which has not run yet.
        queue.release_reserved_place()
        late = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert first.done()
        assert not late.done()
        queue.release_reserved_place()


async def test_released_queue_place_skips_waiter_that_was_cancelled() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve_place()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve_place())
        second = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        first.cancel()
        await run_ready_tasks()
        queue.release_reserved_place()
        await second
    assert queue.reserved == 1


async def test_queue_place_granted_to_cancelled_waiter_goes_to_next_waiter() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve_place()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(queue.reserve_place())
        second = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        # The first waiter gets the place, but it is cancelled before it runs.
        queue.release_reserved_place()
        first.cancel()
        await second
    assert first.cancelled()
    assert queue.reserved == 1


async def test_items_dropped_from_queue_free_their_places_and_wake_waiters() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 2)
    await reserve_places_and_put_items(queue, "a", "b", "c")
    queue.take_startable_item()
    async with asyncio.TaskGroup() as group:
        group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert queue.forget_waiting_items() == ["b", "c"]
    assert (queue.waiting_item_count, queue.reserved, queue.running) == (0, 1, 1)


@pytest.mark.parametrize(
    ("items", "taken", "full", "idle"),
    [(0, 0, False, True), (1, 0, False, False), (1, 1, False, False), (2, 1, True, False)],
)
async def test_reserved_places_do_not_affect_whether_queue_is_full_or_idle(
    items: int, taken: int, *, full: bool, idle: bool
) -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    await reserve_places_and_put_items(queue, *("ab"[:items]))
    for _ in range(taken):
        queue.take_startable_item()
    assert (queue.is_full, queue.is_idle) == (full, idle)
    if not full:
        await queue.reserve_place()
        assert (queue.is_full, queue.is_idle) == (full, idle)


async def test_reservation_cancelled_while_queue_place_becomes_free_raises_cancelled_error() -> (
    None
):
    """A poller that is cancelled by a drain must not continue to poll."""
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await queue.reserve_place()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        waiting.cancel()
        queue.release_reserved_place()
        await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert queue.reserved == 0


async def test_queue_capacity_falls_to_zero_as_allowed_slot_uses_are_used_up() -> None:
    queue: BoundedQueue[int] = BoundedQueue(2, 1, uses=2)
    assert queue.capacity == 2
    for used_up in (False, True):
        await queue.reserve_place()
        queue.put_item(1)
        assert queue.take_startable_item() == 1
        queue.release_slot(used_up=used_up)
    assert queue.capacity == 1
    await queue.reserve_place()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert not waiting.done()
        queue.put_item(2)
        assert queue.take_startable_item() == 2
        assert queue.is_full
        queue.release_slot(used_up=True)
        await run_ready_tasks()
        assert not waiting.done()
        assert (queue.capacity, queue.is_full, queue.is_idle) == (0, True, True)
        waiting.cancel()


class RandomUsersOfBoundedQueue:
    """Tasks that reserve and release places of the same queue at random times."""

    def __init__(self, dice: random.Random, queue: BoundedQueue[int]) -> None:
        self.dice = dice
        self.queue = queue

    async def yield_to_loop_random_times(self) -> None:
        for _ in range(self.dice.randrange(4)):
            await asyncio.sleep(0)

    async def reserve_and_use_place(self, number: int) -> None:
        await self.queue.reserve_place()
        try:
            await self.yield_to_loop_random_times()
        except asyncio.CancelledError:
            self.queue.release_reserved_place()
            raise
        if self.dice.random() < 0.5:
            self.queue.release_reserved_place()
            return
        self.queue.put_item(number)
        if self.queue.take_startable_item() is not None:
            try:
                await self.yield_to_loop_random_times()
            finally:
                self.queue.release_slot()
                self.queue.give_free_places_to_pollers()


@pytest.mark.parametrize("seed", range(20))
async def test_queue_under_random_use_and_cancellation_loses_no_queue_place(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - repeatable, guards nothing
    queue: BoundedQueue[int] = BoundedQueue(2, dice.randrange(3))
    users, tasks = RandomUsersOfBoundedQueue(dice, queue), list[asyncio.Task[None]]()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for number in range(200):
            tasks.append(group.create_task(users.reserve_and_use_place(number)))
            await users.yield_to_loop_random_times()
            if dice.random() < 0.4:
                dice.choice(tasks).cancel()
            assert queue.reserved + queue.running + queue.waiting_item_count <= queue.capacity
            assert queue.running <= queue.concurrency
        while not all(task.done() for task in tasks):
            queue.forget_waiting_items()
            await asyncio.sleep(0)
    assert {task.cancelled() for task in tasks} == {True, False}
    queue.forget_waiting_items()
    assert (queue.reserved, queue.running, queue.waiting_item_count) == (0, 0, 0)
    async with asyncio.timeout(30):
        for _ in range(queue.capacity):
            await queue.reserve_place()


async def test_item_that_waits_for_busy_handler_occupies_no_queue_place() -> None:
    queue: BoundedQueue[str] = BoundedQueue(2, 0)
    await queue.reserve_place()
    queue.release_reserved_place()
    queue.set_item_aside("a")
    await queue.reserve_place()
    await queue.reserve_place()
    assert (queue.reserved, queue.waiting_item_count, queue.is_idle) == (2, 0, False)


async def test_items_of_busy_handlers_are_too_many_when_they_reach_queue_capacity() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    queue.set_item_aside("a")
    assert not queue.too_many_items_set_aside
    queue.set_item_aside("b")
    assert queue.too_many_items_set_aside


async def test_item_of_handler_that_has_become_free_starts_before_queued_items() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 1)
    queue.set_item_aside("a")
    queue.set_item_aside("b")
    await reserve_places_and_put_items(queue, "c")
    queue.may_start = lambda item: item != "a"
    assert queue.take_startable_item() == "b"
    assert (queue.items_set_aside, queue.waiting_item_count, queue.running) == (["a"], 1, 1)


async def test_freed_slot_goes_first_to_item_that_waits_for_handler_then_to_poller() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    await reserve_places_and_put_items(queue, "a")
    assert queue.take_startable_item() == "a"
    queue.set_item_aside("b")
    async with asyncio.TaskGroup() as group:
        poller = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        queue.release_slot()
        assert queue.take_startable_item() == "b"
        queue.give_free_places_to_pollers()
        await run_ready_tasks()
        assert not poller.done()
        queue.release_slot()
        queue.give_free_places_to_pollers()
    assert queue.reserved == 1


async def test_wait_for_fewer_items_of_busy_handlers_ends_when_one_item_starts() -> None:
    queue: BoundedQueue[str] = BoundedQueue(1, 0)
    queue.set_item_aside("a")
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(queue.wait_while_too_many_items_set_aside(3600))
        await run_ready_tasks()
        assert not waiting.done()
        assert queue.take_startable_item() == "a"
