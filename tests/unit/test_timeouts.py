"""Time limits, with a timer of their own or a shared one, behave like `asyncio.timeout`."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from workpool.wire.http.timeouts import CLOCK_SECONDS, SharedTimer, TimeLimit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    MakeTimeLimit = Callable[[float], AbstractAsyncContextManager[object]]

LONG = 60.0


@asynccontextmanager
async def time_limit_with_own_timer(seconds: float) -> AsyncIterator[None]:
    with TimeLimit(seconds):
        yield


@asynccontextmanager
async def time_limit_with_shared_timer(seconds: float) -> AsyncIterator[None]:
    with TimeLimit(seconds, SharedTimer(asyncio.get_running_loop())):
        yield


@pytest.fixture(params=[time_limit_with_own_timer, time_limit_with_shared_timer, asyncio.timeout])
def make_time_limit(request: pytest.FixtureRequest) -> MakeTimeLimit:
    make: MakeTimeLimit = request.param
    return make


def count_pending_cancellations() -> int:
    """Return the number of cancellation requests of this task that are still pending."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


@pytest.mark.parametrize("seconds", [0.0, 0.01, -1.0])
async def test_code_that_exceeds_time_limit_raises_timeout_error(
    make_time_limit: MakeTimeLimit, seconds: float
) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with make_time_limit(seconds):
            await asyncio.sleep(LONG)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert count_pending_cancellations() == 0


async def test_code_that_ends_within_time_limit_is_not_cancelled(
    make_time_limit: MakeTimeLimit,
) -> None:
    async with make_time_limit(0.01):
        pass
    with pytest.raises(KeyError):
        async with make_time_limit(0.01):
            raise KeyError
    # The loop runs timers in order, so a timer that is still set fires before this sleep ends.
    await asyncio.sleep(0.02)
    assert count_pending_cancellations() == 0


async def test_error_raised_in_response_to_timeout_replaces_timeout_error(
    make_time_limit: MakeTimeLimit,
) -> None:
    async def raise_error_at_timeout() -> None:
        async with make_time_limit(0):
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                raise KeyError from None

    with pytest.raises(KeyError):
        await raise_error_at_timeout()
    assert count_pending_cancellations() == 0


async def test_cancellation_before_end_of_time_limit_raises_cancelled_error(
    make_time_limit: MakeTimeLimit,
) -> None:
    started = asyncio.Event()

    async def sleep_within_time_limit() -> None:
        async with make_time_limit(LONG):
            started.set()
            await asyncio.sleep(LONG)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(sleep_within_time_limit())
        await started.wait()
        task.cancel()
    assert task.cancelled()


async def test_cancellation_in_same_loop_iteration_as_timeout_raises_cancelled_error(
    make_time_limit: MakeTimeLimit,
) -> None:
    async def sleep_within_time_limit() -> None:
        async with make_time_limit(0.05):
            asyncio.get_running_loop().call_later(0.05, task.cancel)
            time.sleep(0.1)  # noqa: ASYNC251 - both are due in one turn of the loop, the limit first
            await asyncio.sleep(LONG)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(sleep_within_time_limit())
    assert task.cancelled()


async def test_expired_inner_time_limit_raises_timeout_error_within_outer_limit(
    make_time_limit: MakeTimeLimit,
) -> None:
    texts = []
    async with make_time_limit(LONG):
        try:
            async with make_time_limit(0.01):
                await asyncio.sleep(LONG)
        except TimeoutError:
            texts.append("inner")
    assert texts == ["inner"]
    assert count_pending_cancellations() == 0


async def test_time_limits_that_share_one_timer_end_at_their_own_times() -> None:
    loop = asyncio.get_running_loop()
    timer = SharedTimer(loop)
    early: list[float] = []

    async def wait_until_timeout(seconds: float) -> None:
        until = loop.time() + seconds
        with pytest.raises(TimeoutError), TimeLimit(seconds, timer):
            await asyncio.sleep(LONG)
        if loop.time() < until - 2 * CLOCK_SECONDS:
            early.append(seconds)

    async with asyncio.TaskGroup() as group:
        # The limit of 0.1 s begins while the shared timer is set for the longer limit of 0.2 s.
        for seconds in (0.2, 0.1, 0.3):
            group.create_task(wait_until_timeout(seconds))
        with TimeLimit(LONG, timer):
            await asyncio.sleep(0)
    assert not early
    assert not timer.open
    assert timer.at == float("inf")


async def test_shared_timer_that_has_fired_is_set_again_for_next_time_limit() -> None:
    timer = SharedTimer(asyncio.get_running_loop())
    with TimeLimit(0.05, timer):
        pass
    # The second time limit starts after the shared timer has fired, so it sets the timer again.
    for seconds in (0.1, 0.05):
        with pytest.raises(TimeoutError), TimeLimit(seconds, timer):
            await asyncio.sleep(LONG)
    timer.cancel()
    assert timer.at == float("inf")
