"""The numbers that one worker reports to autoscalers, at `/scale` and in `status()`.

See workpool/docs/operating.md, "Scale automatically".
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp

from workpool import Session, Supervisor, handler
from workpool.events import SessionFinished, SessionStarted

if TYPE_CHECKING:
    from workpool.server import ControlPlane
    from workpool.testing import Recorder


async def fetch_scale_endpoint(pool: Supervisor) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{pool.metrics_url}/scale") as answer:
        assert answer.status == 200
        numbers: dict[str, Any] = await answer.json()
        return numbers


async def test_scale_endpoint_reports_busy_and_idle_slots_of_worker(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait_until_test_allows_end(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue(2)
    async with make_pool(
        wait_until_test_allows_end, concurrency=3, metrics_listen="127.0.0.1:0"
    ) as pool:
        await recorder.wait_for(SessionStarted, count=2)
        assert await fetch_scale_endpoint(pool) == {
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
        async with asyncio.timeout(20):
            # The slots become free shortly after SessionFinished, so wait for the free slots.
            while not (numbers := await fetch_scale_endpoint(pool))["idle_seconds"]:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
            assert (numbers["busy"], numbers["idle"]) == (0, 3)
            first = numbers["idle_seconds"]
            while (await fetch_scale_endpoint(pool))["idle_seconds"] <= first:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)


async def test_scale_numbers_show_that_paused_or_draining_worker_claims_nothing(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait_until_test_allows_end(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue()
    async with make_pool(
        wait_until_test_allows_end, concurrency=2, metrics_listen="127.0.0.1:0"
    ) as pool:
        await recorder.wait_for(SessionStarted)
        pool.pause("the database is moved")
        numbers = await fetch_scale_endpoint(pool)
        assert (numbers["claiming"], numbers["paused"], numbers["busy"]) == (False, True, 1)
        assert "database" not in str(numbers)
        pool.resume()
        assert (await fetch_scale_endpoint(pool))["claiming"]
        pool.request_drain(None)
        numbers = await fetch_scale_endpoint(pool)
        assert (numbers["claiming"], numbers["draining"], numbers["busy"]) == (False, True, 1)
        may_end.set()
        await pool.wait()


def test_status_before_start_shows_slots_and_that_pool_claims_nothing(make_settings: Any) -> None:
    status = Supervisor(make_settings(concurrency=3)).status()
    assert (status.slots, status.claiming, status.idle_seconds) == (3, False, 0.0)
