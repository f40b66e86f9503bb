"""The rate limits: what they let through, in which order, and what a cancelled wait costs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool.wire.budget import Budget


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend(budget: Budget) -> int:
    """How many tokens can be taken right now."""
    return next(count for count in range(10_000) if not budget.try_take())


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


# -- rate --------------------------------------------------------------------------------------


def test_a_rate_of_zero_limits_nothing() -> None:
    assert not Budget("read", 0).limited
    assert Budget("read", 0.1).limited


def test_at_most_a_quarter_of_a_second_at_once(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    assert spend(budget) == 5
    clock.now += 60
    assert spend(budget) == 5


def test_a_slow_rate_still_lets_one_through(clock: Clock) -> None:
    budget = Budget("write", 0.5, clock)
    assert spend(budget) == 1
    clock.now += 1.9
    assert spend(budget) == 0
    clock.now += 0.2
    assert spend(budget) == 1


def test_the_rate_is_what_passes_per_second(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    spend(budget)
    passed = 0
    for _ in range(1000):
        clock.now += 0.01
        passed += spend(budget)
    assert passed == pytest.approx(200, abs=1)


def test_a_clock_that_stands_or_steps_back_gives_nothing(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    spend(budget)
    clock.now -= 100
    assert spend(budget) == 0
    clock.now += 0.06
    assert spend(budget) == 1


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 3), max_size=60))
def test_never_more_than_rate_and_burst(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    budget = Budget("write", rate, clock)
    passed = spend(budget)
    for pause in pauses:
        clock.now += pause
        passed += spend(budget)
        assert passed <= max(1.0, rate / 4) + rate * (clock.now - 1000.0) + 1e-6


# -- heartbeats --------------------------------------------------------------------------------


def test_heartbeats_take_from_the_rate_without_waiting(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    spend(budget)
    passed = 0
    for _ in range(100):
        clock.now += 0.1
        budget.debit()  # 10 a second
        passed += spend(budget)
    assert passed == pytest.approx(100, abs=2)


def test_heartbeats_leave_a_quarter_to_the_others(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    spend(budget)
    passed = 0
    for _ in range(1000):
        clock.now += 0.01
        budget.debit()  # 100 a second, five times the rate
        passed += spend(budget)
    assert passed == pytest.approx(50, abs=1)


def test_a_storm_of_heartbeats_is_forgotten_soon(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    spend(budget)
    for _ in range(10_000):
        budget.debit()
    clock.now += 20 / 15  # a second's worth of debt, paid with three quarters of the rate
    spend(budget)
    clock.now += 0.25
    assert spend(budget) == 5


# -- waiting -----------------------------------------------------------------------------------


async def test_a_wait_is_as_long_as_the_rate_says() -> None:
    budget = Budget("write", 50)
    spend(budget)
    started = time.monotonic()
    for _ in range(10):
        await budget.take()
    # Never shorter; how much longer is the machine's business.
    assert time.monotonic() - started >= 9 / 50


async def test_a_wait_under_debt_ends() -> None:
    budget = Budget("write", 200)
    started = time.monotonic()  # before the spending: what comes in meanwhile counts
    spend(budget)
    for _ in range(20):
        budget.debit()
    await budget.take()
    assert time.monotonic() - started >= 1 / 200


async def test_the_line_is_served_in_its_order(clock: Clock) -> None:
    budget = Budget("write", 1, clock)
    spend(budget)
    served: list[int] = []

    async def take(number: int) -> None:
        await budget.take()
        served.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(take(number))
        await settle()
        assert not budget.try_take()
        for _ in range(5):
            clock.now += 1
            budget.give_back()  # moves the first, and the one that leaves moves the next
            await settle()
    assert served == [0, 1, 2, 3, 4]


async def test_nobody_overtakes_the_line(clock: Clock) -> None:
    budget = Budget("write", 1, clock)
    spend(budget)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(budget.take())
        await settle()
        clock.now += 1
        assert not budget.try_take()  # there is a token, and it is the first one's
        budget.give_back()
        await settle()
        assert first.done()


async def test_a_cancelled_wait_takes_nothing_and_lets_the_next_one_on(clock: Clock) -> None:
    budget = Budget("write", 1, clock)
    spend(budget)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(budget.take()) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        waiting[1].cancel()
        clock.now += 1
        await settle()
        assert [task.cancelled() for task in waiting] == [True, True, False]
        assert waiting[2].done()
    assert spend(budget) == 0
    clock.now += 1
    assert spend(budget) == 1


async def test_a_token_given_back_is_used_at_once(clock: Clock) -> None:
    budget = Budget("write", 0.001, clock)
    assert budget.try_take()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(budget.take())
        await settle()
        assert not waiting.done()
        budget.give_back()
        await settle()
        assert waiting.done()


async def test_tokens_given_back_do_not_pile_up(clock: Clock) -> None:
    budget = Budget("write", 20, clock)
    for _ in range(50):
        budget.give_back()
    assert spend(budget) == 5


# -- two threads -------------------------------------------------------------------------------


def test_two_event_loops_share_one_line() -> None:
    budget = Budget("write", 200)
    spend(budget)
    started = time.monotonic()

    async def many() -> None:
        await asyncio.gather(*(budget.take() for _ in range(20)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - started >= 39 / 200


async def test_a_loop_that_died_does_not_hold_up_the_line(clock: Clock) -> None:
    budget = Budget("write", 1, clock)
    spend(budget)
    left_behind: list[Any] = []

    def die_in_line() -> None:
        dead = asyncio.new_event_loop()
        left_behind.append(dead.create_task(budget.take()))  # which nobody will ever resume
        dead.call_later(0.01, dead.stop)
        dead.run_forever()
        dead.close()

    await asyncio.to_thread(die_in_line)
    assert not left_behind[0].done()
    async with asyncio.TaskGroup() as group:
        living = group.create_task(budget.take())
        await settle()
        clock.now += 1
        await asyncio.wait_for(living, 10)
    left_behind[0]._log_destroy_pending = False


async def test_what_is_given_back_from_another_thread_moves_the_line(clock: Clock) -> None:
    budget = Budget("write", 0.001, clock)
    assert budget.try_take()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(budget.take())
        await settle()
        await asyncio.to_thread(budget.give_back)
        await asyncio.wait_for(waiting, 10)
