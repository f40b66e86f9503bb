"""Shared slots: one slot is reserved for each environment, the rest are shared max-min fairly."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.unit.event_loops import run_ready_tasks
from workpool.pool.bounded_queue import BoundedQueue
from workpool.pool.shared_slots import SharedSlots


def make_queues_with_shared_slots(
    slots: SharedSlots, number: int, concurrency: int
) -> list[BoundedQueue[str]]:
    return [
        BoundedQueue(concurrency, 0, share=slots.add_environment_share()) for _ in range(number)
    ]


async def start_items_in_slots(queue: BoundedQueue[str], number: int) -> None:
    for _ in range(number):
        await queue.reserve_place()
        queue.put_item("item")
        assert queue.take_startable_item() == "item"


def end_item(queue: BoundedQueue[str], *, used_up: bool = False) -> None:
    queue.release_slot(used_up=used_up)
    queue.give_free_places_to_pollers()


async def test_busy_environment_leaves_one_slot_to_each_other_environment() -> None:
    busy, idle, other = make_queues_with_shared_slots(SharedSlots(6), 3, 6)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(busy, 4)
        assert (busy.free_slot_count, busy.is_full) == (0, True)
        fifth = group.create_task(busy.reserve_place())
        await run_ready_tasks()
        assert not fifth.done()
        await idle.reserve_place()
        await other.reserve_place()
        assert (idle.free_slot_count, idle.is_full) == (1, False)
        fifth.cancel()


async def test_freed_slot_goes_to_waiting_environment_with_fewest_slots() -> None:
    busy, late = make_queues_with_shared_slots(SharedSlots(6), 2, 6)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(busy, 5)
        await start_items_in_slots(late, 1)
        own, others = (
            group.create_task(busy.reserve_place()),
            [late.reserve_place() for _ in range(2)],
        )
        tasks = [group.create_task(each) for each in others]
        await run_ready_tasks()
        end_item(busy)
        await tasks[0]
        end_item(busy)
        await tasks[1]
        assert not own.done()
        # Each environment has three slots now, so the freed slot goes to the longest waiter.
        end_item(busy)
        await own
    assert (busy.running + busy.reserved, late.running + late.reserved) == (3, 3)


async def test_environments_with_equal_numbers_of_slots_receive_free_slot_in_turn() -> None:
    three = make_queues_with_shared_slots(SharedSlots(4), 3, 4)
    order: list[int] = []

    async def reserve_shared_slot_repeatedly(number: int) -> None:
        for _ in range(4):
            await three[number].reserve_place()
            order.append(number)
            await asyncio.sleep(0)
            three[number].release_reserved_place()

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for queue in three:
            await queue.reserve_place()
        for number in range(3):
            group.create_task(reserve_shared_slot_repeatedly(number))
    assert order == [0, 1, 2] * 4


async def test_slot_goes_to_poller_of_environment_with_fewer_slots_before_item_set_aside() -> None:
    busy, late = make_queues_with_shared_slots(SharedSlots(4), 2, 4)
    started: list[str] = []
    busy.start = started.append
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(busy, 3)
        await start_items_in_slots(late, 1)
        busy.set_item_aside("aside")
        second = group.create_task(late.reserve_place())
        await run_ready_tasks()
        busy.release_slot()
        assert busy.take_startable_item() is None
        busy.give_free_places_to_pollers()
        await second
        assert started == []
        late.release_reserved_place()
    assert started == ["aside"]


async def test_item_that_waits_for_handler_starts_when_another_environment_frees_slot() -> None:
    first, second = make_queues_with_shared_slots(SharedSlots(3), 2, 3)
    started: list[str] = []
    first.start = started.append
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(first, 1)
        await start_items_in_slots(second, 2)
        first.set_item_aside("aside")
        poller = group.create_task(first.reserve_place())
        await run_ready_tasks()
        assert first.take_startable_item() is None
        end_item(second)
        assert (started, first.items_set_aside, first.running) == (["aside"], [], 2)
        assert not poller.done()
        end_item(first)
        await poller


async def test_freed_slot_goes_to_poller_while_handler_of_waiting_item_is_busy() -> None:
    first, second = make_queues_with_shared_slots(SharedSlots(3), 2, 3)
    first.may_start = lambda _: False
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(first, 1)
        await start_items_in_slots(second, 2)
        first.set_item_aside("aside")
        poller = group.create_task(first.reserve_place())
        await run_ready_tasks()
        end_item(second)
        await poller
    assert (first.items_set_aside, first.reserved) == (["aside"], 1)


async def test_item_that_waits_for_handler_starts_when_another_environment_reserves_place() -> None:
    first, second = make_queues_with_shared_slots(SharedSlots(4), 2, 4)
    handler_is_free = False
    started: list[str] = []
    first.may_start, first.start = lambda _: handler_is_free, started.append
    async with asyncio.timeout(20):
        await start_items_in_slots(first, 1)
        await start_items_in_slots(second, 1)
        first.set_item_aside("aside")
        handler_is_free = True
        await second.reserve_place()
    assert (started, second.reserved) == (["aside"], 1)


async def test_slot_reserved_by_ended_environment_becomes_free_for_other_environments() -> None:
    slots = SharedSlots(2)
    share = slots.add_environment_share()
    [queue] = make_queues_with_shared_slots(slots, 1, 2)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(queue, 1)
        waiting = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert not waiting.done()
        share.release_reserved_slot()
        await waiting


async def test_uses_of_shared_slots_in_all_environments_count_towards_one_limit() -> None:
    first, second = make_queues_with_shared_slots(SharedSlots(4, uses=2), 2, 4)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(first, 1)
        await start_items_in_slots(second, 1)
        third = group.create_task(second.reserve_place())
        await run_ready_tasks()
        end_item(first, used_up=True)
        # This item does not count towards the limit `uses`, so one more item may run.
        end_item(second)
        await third
        fourth = group.create_task(first.reserve_place())
        await run_ready_tasks()
        assert not fourth.done()
        fourth.cancel()


async def test_shared_slots_of_dropped_items_and_cancelled_reservations_become_free() -> None:
    slots = SharedSlots(3)
    share = slots.add_environment_share()
    queue: BoundedQueue[str] = BoundedQueue(2, 1, share=share)
    slots.add_environment_share()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await start_items_in_slots(queue, 1)
        await queue.reserve_place()
        queue.put_item("waits")
        waiting = group.create_task(queue.reserve_place())
        await run_ready_tasks()
        assert share.taken == 2
        waiting.cancel()
        assert queue.forget_waiting_items() == ["waits"]
        await run_ready_tasks()
        end_item(queue)
    assert share.taken == 0


class PollersActingAtRandom:
    """Pollers of several environments that reserve slots, run items and release slots at random."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)  # noqa: S311 - for a test
        self.total = self.dice.randint(3, 9)
        slots = SharedSlots(self.total)
        self.shares = [slots.add_environment_share() for _ in range(self.dice.randint(1, 3))]
        self.queues = [
            BoundedQueue[str](
                self.dice.randint(1, self.total), self.dice.choice([0, 2]), share=each
            )
            for each in self.shares
        ]

    async def poll_repeatedly(self, queue: BoundedQueue[str]) -> None:
        for _ in range(30):
            await queue.reserve_place()
            await asyncio.sleep(0)
            if self.dice.random() < 0.4:
                queue.release_reserved_place()
            else:
                await self.run_item(queue)
            assert sum(share.taken for share in self.shares) <= self.total

    async def run_item(self, queue: BoundedQueue[str]) -> None:
        queue.put_item("item")
        if queue.take_startable_item() is None:
            return
        for _ in range(self.dice.randrange(3)):
            await asyncio.sleep(0)
        assert sum(each.running for each in self.queues) <= self.total
        queue.release_slot()
        while queue.take_startable_item() is not None:
            queue.release_slot()
        queue.give_free_places_to_pollers()


@pytest.mark.parametrize("seed", range(20))
async def test_random_use_of_shared_slots_stays_within_total_and_starves_no_environment(
    seed: int,
) -> None:
    storm = PollersActingAtRandom(seed)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for queue in storm.queues * 3:
            group.create_task(storm.poll_repeatedly(queue))
    for share, queue in zip(storm.shares, storm.queues, strict=True):
        assert share.taken == queue.waiting_item_count + queue.running + queue.reserved
