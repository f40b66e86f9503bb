"""What is left of a session after its end, and of an attempt that was none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, handler
from workpool.errors import SessionEnded
from workpool.events import DrainStarted, SessionFinished
from workpool.testing import Hold, expire_lease

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder


async def test_a_task_that_outlives_its_handler_sends_nothing(run_one: Any, faults: Faults) -> None:
    over = asyncio.Event()

    async def linger(session: Session) -> float:
        await over.wait()
        with pytest.raises(SessionEnded):
            await session.update_metadata({"too": "late"})
        return session.lease_remaining

    async with asyncio.TaskGroup() as group:
        lingering: list[asyncio.Task[float]] = []

        async def work(session: Session) -> None:
            lingering.append(group.create_task(linger(session)))

        assert (await run_one(work)).outcome == "completed"
        over.set()
    assert lingering[0].result() == 0
    assert not faults.of("update")


async def test_a_session_that_a_drain_keeps_from_starting_is_no_attempt(
    plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    @handler
    async def work(_: Session) -> None:
        raise AssertionError

    (item,) = plane.enqueue()
    plane.operations.ack(plane.environments[0], item.id)
    expire_lease(plane, item.id)
    hold = Hold()
    faults.add(hold, "heartbeat", times=1)
    async with make_pool(work, max_attempts=2) as pool, asyncio.TaskGroup() as group:
        await hold.reached()
        group.create_task(pool.drain())
        await recorder.wait_for(DrainStarted)
        hold.release()
    assert recorder.of(SessionFinished)[0].outcome == "released"
    assert not plane.operations.get(plane.environments[0], item.id).metadata
