"""The numbers of one worker for autoscalers, at `/scale` and in `status()`.

See workpool/docs/operating.md, "Scale automatically".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp

from workpool import Session, Supervisor, handler
from workpool.events import PollFinished, SessionFinished, SessionStarted

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Recorder


async def scale_of(pool: Supervisor) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{pool.metrics_url}/scale") as answer:
        assert answer.status == 200
        numbers: dict[str, Any] = await answer.json()
        return numbers


async def test_scale_of_worker_counts_busy_and_idle_slots(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue(2)
    async with make_pool(wait, concurrency=3, metrics_listen="127.0.0.1:0") as pool:
        await recorder.wait_for(SessionStarted, count=2)
        assert await scale_of(pool) == {
            "busy": 2,
            "idle": 1,
            "slots": 3,
            "waiting": 0,
            "claiming": True,
            "paused": False,
            "draining": False,
            "idle_seconds": 0.0,
        }
        may_end.set()
        await recorder.wait_for(SessionFinished, count=2)
        numbers = await scale_of(pool)
        while numbers["busy"]:  # the event comes before the slot is free
            numbers = await scale_of(pool)
        assert numbers["idle"] == 3
        first = (await scale_of(pool))["idle_seconds"]
        await recorder.wait_for(PollFinished, count=len(recorder.of(PollFinished)) + 1)
        assert (await scale_of(pool))["idle_seconds"] > first > 0


async def test_scale_of_paused_and_of_draining_worker_says_that_it_claims_nothing(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue()
    async with make_pool(wait, concurrency=2, metrics_listen="127.0.0.1:0") as pool:
        await recorder.wait_for(SessionStarted)
        pool.pause("the database is moved")
        numbers = await scale_of(pool)
        assert (numbers["claiming"], numbers["paused"], numbers["busy"]) == (False, True, 1)
        assert "database" not in str(numbers)
        pool.resume()
        assert (await scale_of(pool))["claiming"]
        pool.request_drain(None)
        numbers = await scale_of(pool)
        assert (numbers["claiming"], numbers["draining"], numbers["busy"]) == (False, True, 1)
        may_end.set()
        await pool.wait()


def test_status_before_the_start_claims_nothing(make_settings: Any) -> None:
    status = Supervisor(make_settings(concurrency=3)).status()
    assert (status.slots, status.claiming, status.idle_seconds) == (3, False, 0.0)
