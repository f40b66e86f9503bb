"""Handlers that drain their own pool or another one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Supervisor, handler
from workpool.events import DrainFinished, SessionFinished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Drain = Callable[[], Awaitable[None]]

    from workpool.server import ControlPlane
    from workpool.testing import Recorder


async def await_pool_drain(drain: Drain) -> None:
    await drain()


async def drain_pool_in_task(drain: Drain) -> None:
    """Await the drain in a task that the handler starts, and raise the error of the drain."""
    errors: list[BaseException] = []

    async def record_drain_error() -> None:
        try:
            await drain()
        except RuntimeError as error:
            errors.append(error)

    async with asyncio.TaskGroup() as group:
        group.create_task(record_drain_error())
    raise errors[0]


@pytest.mark.parametrize("call", [await_pool_drain, drain_pool_in_task])
async def test_drain_called_in_handler_raises_and_suggests_request_drain(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, call: Any
) -> None:
    pools: list[Supervisor] = []

    @handler
    async def handler_that_drains(_: Session) -> None:
        await call(pools[0].drain)

    control_plane.enqueue()
    pools.append(make_pool(handler_that_drains))
    async with pools[0]:
        finished = await recorder.wait_for(SessionFinished)
        assert not pools[0].status().draining
    assert isinstance(finished.error, RuntimeError)
    assert "call request_drain() instead" in str(finished.error)


async def test_handler_that_calls_request_drain_can_complete_its_session(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    pools: list[Supervisor] = []

    @handler
    async def handler_that_requests_drain(session: Session) -> None:
        pools[0].request_drain()
        await session.interrupted()
        assert session.draining

    control_plane.enqueue()
    pools.append(make_pool(handler_that_requests_drain))
    async with asyncio.timeout(20):
        await pools[0].run()
    [finished] = recorder.of(SessionFinished)
    assert (finished.outcome, finished.error) == ("completed", None)
    assert [event.result for event in recorder.of(DrainFinished)] == ["clean"]


async def test_handler_can_drain_another_pool(
    control_plane: ControlPlane, make_pool: Any, make_settings: Any, recorder: Recorder
) -> None:
    other = Supervisor(make_settings(), plugins=[handler_that_never_matches])

    @handler
    async def handler_that_drains_other_pool(_: Session) -> None:
        await other.drain()

    async with make_pool(handler_that_drains_other_pool):
        async with other:
            other.request_drain(0)
            await other.wait()
        control_plane.enqueue()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.error is None


@handler(metadata={"never": "matches"})
async def handler_that_never_matches(_: Session) -> None:
    raise AssertionError


def test_request_drain_before_start_raises(make_settings: Any) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        Supervisor(make_settings(), plugins=[handler_that_never_matches]).request_drain()
