"""Rate limits: throughput, order of waiters, and cancelled waits."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.manual_clock import ManualClock
from tests.unit.event_loops import run_ready_tasks
from tests.unit.limiter_tokens import acquire_all_tokens
from workpool.wire.http.call_options import Priority
from workpool.wire.http.rate_limiter import RateLimiter

COMPLETION, CLAIM, HANDLER = Priority


@pytest.fixture
def manual_clock() -> ManualClock:
    return ManualClock(1000.0)


def test_rate_limiter_with_rate_zero_is_unlimited() -> None:
    assert not RateLimiter("read", 0).limited
    assert RateLimiter("read", 0.1).limited


def test_rate_limiter_allows_burst_of_a_quarter_second(manual_clock: ManualClock) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    assert acquire_all_tokens(limiter) == 5
    manual_clock.advance(60)
    assert acquire_all_tokens(limiter) == 5


def test_rate_limiter_with_rate_below_one_allows_burst_of_one_request(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 0.5, manual_clock)
    assert acquire_all_tokens(limiter) == 1
    manual_clock.advance(1.9)
    assert acquire_all_tokens(limiter) == 0
    manual_clock.advance(0.2)
    assert acquire_all_tokens(limiter) == 1


def test_rate_limiter_allows_configured_number_of_requests_per_second(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    acquire_all_tokens(limiter)
    passed = 0
    for _ in range(1000):
        manual_clock.advance(0.01)
        passed += acquire_all_tokens(limiter)
    assert passed == pytest.approx(200, abs=1)


def test_rate_limiter_gains_no_tokens_from_a_stopped_or_reversed_clock(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    acquire_all_tokens(limiter)
    manual_clock.advance(-100)
    assert acquire_all_tokens(limiter) == 0
    manual_clock.advance(0.06)
    assert acquire_all_tokens(limiter) == 1


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 3), max_size=60))
def test_rate_limiter_never_exceeds_rate_plus_burst(rate: float, pauses: list[float]) -> None:
    clock = ManualClock(1000.0)
    limiter = RateLimiter("write", rate, clock)
    passed = acquire_all_tokens(limiter)
    for pause in pauses:
        clock.advance(pause)
        passed += acquire_all_tokens(limiter)
        assert passed <= max(1.0, rate / 4) + rate * (clock.now - 1000.0) + 1e-6


def test_heartbeats_take_rate_limit_tokens_from_other_requests_without_waiting(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    acquire_all_tokens(limiter)
    passed = 0
    for _ in range(100):
        manual_clock.advance(0.1)
        limiter.charge()  # Ten heartbeats a second are half of the limiter's rate.
        passed += acquire_all_tokens(limiter)
    assert passed == pytest.approx(100, abs=2)


def test_heartbeats_above_rate_limit_leave_a_quarter_of_rate_to_other_requests(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    acquire_all_tokens(limiter)
    passed = 0
    for _ in range(1000):
        manual_clock.advance(0.01)
        limiter.charge()  # 100 heartbeats a second are five times the limiter's rate.
        passed += acquire_all_tokens(limiter)
    assert passed == pytest.approx(50, abs=1)


def test_heartbeats_overdraw_rate_limiter_by_at_most_one_second_of_tokens(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    acquire_all_tokens(limiter)
    for _ in range(10_000):
        limiter.charge()
    # Heartbeats overdraw the limit by at most one second (20 tokens); 15 tokens a second repay it.
    manual_clock.advance(20 / 15)
    acquire_all_tokens(limiter)
    manual_clock.advance(0.25)
    assert acquire_all_tokens(limiter) == 5


async def test_rate_limiter_without_tokens_delays_requests_to_configured_rate() -> None:
    limiter = RateLimiter("write", 50)
    # Read the clock first, because the limiter gains tokens after `acquire_all_tokens`.
    started = time.monotonic()
    acquire_all_tokens(limiter)
    for _ in range(10):
        await limiter.acquire()
    # The wait has a lower bound only, because a slow machine may wait longer.
    assert time.monotonic() - started >= 9 / 50


async def test_request_waits_for_token_after_heartbeats_exceeded_rate_limit() -> None:
    limiter = RateLimiter("write", 200)
    # Read the clock first, because the limiter gains tokens while `acquire_all_tokens` runs.
    started = time.monotonic()
    acquire_all_tokens(limiter)
    for _ in range(20):
        limiter.charge()
    await limiter.acquire()
    assert time.monotonic() - started >= 1 / 200


async def test_waiters_of_one_priority_acquire_tokens_in_order(manual_clock: ManualClock) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    acquire_all_tokens(limiter)
    served: list[int] = []

    async def acquire_token_and_record_number(number: int) -> None:
        await limiter.acquire()
        served.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(acquire_token_and_record_number(number))
        await run_ready_tasks()
        assert not limiter.try_acquire()
        for _ in range(5):
            manual_clock.advance(1)
            # A refund wakes the first waiter, which wakes the next one after its acquisition.
            limiter.refund()
            await run_ready_tasks()
    assert served == [0, 1, 2, 3, 4]


async def test_try_acquire_fails_while_another_task_waits_for_token(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    acquire_all_tokens(limiter)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(limiter.acquire())
        await run_ready_tasks()
        manual_clock.advance(1)
        assert not limiter.try_acquire()  # The available token belongs to the first waiter.
        limiter.refund()
        await run_ready_tasks()
        assert first.done()


async def test_cancelled_waiter_takes_no_token_and_next_waiter_proceeds(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    acquire_all_tokens(limiter)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(limiter.acquire()) for _ in range(3)]
        await run_ready_tasks()
        waiting[0].cancel()
        waiting[1].cancel()
        manual_clock.advance(1)
        await run_ready_tasks()
        assert [task.cancelled() for task in waiting] == [True, True, False]
        assert waiting[2].done()
    assert acquire_all_tokens(limiter) == 0
    manual_clock.advance(1)
    assert acquire_all_tokens(limiter) == 1


async def test_refunded_rate_limit_token_goes_to_waiting_task_at_once(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 0.001, manual_clock)
    assert limiter.try_acquire()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(limiter.acquire())
        await run_ready_tasks()
        assert not waiting.done()
        limiter.refund()
        await run_ready_tasks()
        assert waiting.done()


async def test_refunds_never_raise_tokens_of_rate_limiter_above_burst_size(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 20, manual_clock)
    for _ in range(50):
        limiter.refund()
    assert acquire_all_tokens(limiter) == 5


class WaitersOnRateLimiter:
    """Waiters on a limiter whose tokens the test hands out one by one.

    Attributes:
        served: The priorities of the waiters that got a token, in order.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self.served: list[Priority] = []
        self.limiter = RateLimiter("write", 1, ManualClock(1000.0))
        self.limiter.try_acquire()
        self._group = group

    async def add_waiters(self, *priorities: Priority) -> None:
        for priority in priorities:
            self._group.create_task(self._acquire_token(priority))
        await run_ready_tasks()

    async def refund_tokens(self, count: int) -> None:
        for _ in range(count):
            self.limiter.refund()
            await run_ready_tasks()

    async def _acquire_token(self, priority: Priority) -> None:
        await self.limiter.acquire(priority)
        self.served.append(priority)


async def test_completions_get_tokens_before_all_other_priorities() -> None:
    async with asyncio.TaskGroup() as group:
        queue = WaitersOnRateLimiter(group)
        await queue.add_waiters(HANDLER, CLAIM, HANDLER, COMPLETION, COMPLETION)
        await queue.refund_tokens(2)
        assert queue.served == [COMPLETION, COMPLETION]
        await queue.add_waiters(COMPLETION)
        await queue.refund_tokens(1)
        assert queue.served == [COMPLETION] * 3
        await queue.refund_tokens(3)


async def test_waiting_claims_and_handler_calls_get_rate_limit_tokens_alternately() -> None:
    async with asyncio.TaskGroup() as group:
        queue = WaitersOnRateLimiter(group)
        await queue.add_waiters(*[HANDLER] * 5, *[CLAIM] * 3)
        await queue.refund_tokens(8)
    assert queue.served == [CLAIM, HANDLER] * 3 + [HANDLER, HANDLER]


async def test_completion_request_does_not_change_alternation_of_claims_and_handler_calls() -> None:
    async with asyncio.TaskGroup() as group:
        queue = WaitersOnRateLimiter(group)
        await queue.add_waiters(CLAIM, CLAIM, HANDLER, HANDLER)
        await queue.refund_tokens(1)
        await queue.add_waiters(COMPLETION)
        await queue.refund_tokens(4)
    assert queue.served == [CLAIM, COMPLETION, HANDLER, CLAIM, HANDLER]


async def test_try_acquire_for_completion_succeeds_while_a_claim_waits(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    limiter.try_acquire()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(limiter.acquire(CLAIM))
        await run_ready_tasks()
        manual_clock.advance(1)
        assert not limiter.try_acquire(HANDLER)
        assert not limiter.try_acquire(CLAIM)
        assert limiter.try_acquire(COMPLETION)
        await run_ready_tasks()
        assert not waiting.done()
        limiter.refund()


async def test_try_acquire_for_completion_fails_while_another_completion_waits(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    limiter.try_acquire()
    async with asyncio.TaskGroup() as group:
        group.create_task(limiter.acquire(COMPLETION))
        await run_ready_tasks()
        manual_clock.advance(1)
        assert not limiter.try_acquire(COMPLETION)
        limiter.refund()


async def test_completions_get_a_quarter_of_rate_when_heartbeats_exceed_rate() -> None:
    """Completions get a quarter of the limiter's rate, even while claims and handler calls wait."""
    clock = ManualClock(1000.0)
    async with asyncio.TaskGroup() as group:
        limiter = RateLimiter("write", 20, clock)
        acquire_all_tokens(limiter)
        others = [group.create_task(limiter.acquire(each)) for each in (CLAIM, HANDLER) * 20]
        await run_ready_tasks()
        passed = 0
        for _ in range(1000):
            clock.advance(0.01)
            limiter.charge()  # 100 heartbeats a second are five times the limiter's rate.
            passed += limiter.try_acquire(COMPLETION)
        assert passed == pytest.approx(50, abs=1)
        assert not any(task.done() for task in others)
        for task in others:
            task.cancel()


class ReferenceModelOfTokenOrder:
    """Computes which waiter of a rate limiter must get the next token."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Priority, asyncio.Task[None]]] = []
        self._turn = CLAIM

    def remove_next_waiter(self) -> tuple[Priority, asyncio.Task[None]]:
        order = (COMPLETION, self._turn, *{CLAIM, HANDLER} - {self._turn})
        first = min(self.waiting, key=lambda each: order.index(each[0]))
        self.waiting.remove(first)
        if first[0] is not COMPLETION:
            self._turn = HANDLER if first[0] is CLAIM else CLAIM
        return first

    def cancel_one_waiter(self) -> None:
        if self.waiting:
            self.waiting.pop(len(self.waiting) // 2)[1].cancel()


@given(st.lists(st.one_of(st.sampled_from(Priority), st.just("token"), st.just("cancel"))))
def test_rate_limiter_grants_tokens_in_same_order_as_simple_model(
    steps: list[Priority | str],
) -> None:
    async def compare_with_model() -> None:
        model, spare = ReferenceModelOfTokenOrder(), False
        # At four tokens a second, the burst of a quarter second is one token.
        limiter = RateLimiter("write", 4, ManualClock(1000.0))
        limiter.try_acquire()
        async with asyncio.TaskGroup() as group:
            for step in steps:
                if isinstance(step, Priority):
                    model.waiting.append((step, group.create_task(limiter.acquire(step))))
                elif step == "token":
                    limiter.refund()
                    spare = True
                else:
                    model.cancel_one_waiter()
                await run_ready_tasks()
                if model.waiting and spare:
                    assert model.remove_next_waiter()[1].done()
                    spare = False
                assert not any(task.done() for _, task in model.waiting)
            for _, task in model.waiting:
                task.cancel()

    asyncio.run(compare_with_model())


def test_two_event_loops_on_two_threads_share_one_rate() -> None:
    limiter = RateLimiter("write", 200)
    # Read the clock first, because the limiter gains tokens after `acquire_all_tokens`.
    started = time.monotonic()
    acquire_all_tokens(limiter)

    async def acquire_twenty_tokens() -> None:
        await asyncio.gather(*(limiter.acquire() for _ in range(20)))

    threads = [
        threading.Thread(target=asyncio.run, args=(acquire_twenty_tokens(),)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert time.monotonic() - started >= 39 / 200


async def test_waiter_left_in_closed_event_loop_does_not_delay_other_waiters(
    manual_clock: ManualClock,
) -> None:
    limiter = RateLimiter("write", 1, manual_clock)
    acquire_all_tokens(limiter)
    left_behind: list[Any] = []

    def close_loop_with_waiting_task() -> None:
        dead = asyncio.new_event_loop()
        left_behind.append(dead.create_task(limiter.acquire()))
        dead.call_later(0.01, dead.stop)
        dead.run_forever()
        dead.close()

    await asyncio.to_thread(close_loop_with_waiting_task)
    assert not left_behind[0].done()
    async with asyncio.TaskGroup() as group:
        living = group.create_task(limiter.acquire())
        await run_ready_tasks()
        manual_clock.advance(1)
        await asyncio.wait_for(living, 10)
    left_behind[0]._log_destroy_pending = False


async def test_refund_from_another_thread_wakes_first_waiter(manual_clock: ManualClock) -> None:
    limiter = RateLimiter("write", 0.001, manual_clock)
    assert limiter.try_acquire()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(limiter.acquire())
        await run_ready_tasks()
        await asyncio.to_thread(limiter.refund)
        await asyncio.wait_for(waiting, 10)


def test_tokens_acquired_and_refunded_on_two_threads_add_up() -> None:
    # At 8000 tokens a second, the burst of a quarter second is 2000 tokens.
    limiter = RateLimiter("write", 8000, ManualClock(1000.0))

    async def acquire_and_refund_tokens(priority: Priority) -> None:
        for number in range(300):
            await limiter.acquire(priority)
            if number % 3 == 0:
                limiter.refund()

    async def acquire_with_every_priority() -> None:
        async with asyncio.TaskGroup() as group:
            for priority in Priority:
                group.create_task(acquire_and_refund_tokens(priority))

    threads = [
        threading.Thread(target=asyncio.run, args=(acquire_with_every_priority(),))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert acquire_all_tokens(limiter) == 2000 - 2 * 3 * 200
