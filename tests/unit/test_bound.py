"""A bound keeps to the rules of `asyncio.timeout`: each test is run on both."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from workpool.wire.http.bound import Bound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    Bounded = Callable[[float], AbstractAsyncContextManager[object]]

LONG = 60.0


@asynccontextmanager
async def ours(seconds: float) -> AsyncIterator[None]:
    with Bound(seconds, asyncio.get_running_loop()):
        yield


@pytest.fixture(params=[ours, asyncio.timeout])
def bounded(request: pytest.FixtureRequest) -> Bounded:
    bound: Bounded = request.param
    return bound


def left() -> int:
    """Cancellations of this task that nobody has taken back."""
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


@pytest.mark.parametrize("seconds", [0.0, 0.01, -1.0])
async def test_time_runs_out(bounded: Bounded, seconds: float) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with bounded(seconds):
            await asyncio.sleep(LONG)
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert left() == 0


async def test_call_that_ends_in_time_is_not_changed(bounded: Bounded) -> None:
    async with bounded(0.01):
        pass
    with pytest.raises(KeyError):
        async with bounded(0.01):
            raise KeyError
    await asyncio.sleep(0.02)
    assert left() == 0


async def test_an_error_that_follows_the_bound_is_raised_as_it_is(bounded: Bounded) -> None:
    async def wait() -> None:
        async with bounded(0):
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                raise KeyError from None

    with pytest.raises(KeyError):
        await wait()
    assert left() == 0


async def test_a_cancellation_goes_through(bounded: Bounded) -> None:
    started = asyncio.Event()

    async def wait() -> None:
        async with bounded(LONG):
            started.set()
            await asyncio.sleep(LONG)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait())
        await started.wait()
        task.cancel()
    assert task.cancelled()


async def test_a_cancellation_in_the_turn_of_the_bound_is_not_taken_for_it(
    bounded: Bounded,
) -> None:
    started = asyncio.Event()

    async def wait() -> None:
        async with bounded(0.05):
            started.set()
            await asyncio.sleep(LONG)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait())
        await started.wait()
        asyncio.get_running_loop().call_later(0.05, task.cancel)
        time.sleep(0.1)  # noqa: ASYNC251 - both are due in one turn of the loop, the bound first
    assert task.cancelled()


async def test_of_two_that_run_out_the_inner_one_says_so(bounded: Bounded) -> None:
    said = []
    async with bounded(LONG):
        try:
            async with bounded(0.01):
                await asyncio.sleep(LONG)
        except TimeoutError:
            said.append("inner")
    assert said == ["inner"]
    assert left() == 0
