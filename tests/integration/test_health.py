"""The answers of `/healthz` and `/readyz` while a pool runs.

See workpool/docs/operating.md, "Health".
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import aiohttp

from workpool import Session, Supervisor, handler
from workpool.events import SessionFinished, SessionStarted

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Recorder


async def get_health_report(supervisor: Supervisor, path: str) -> tuple[int, Any]:
    url = f"{supervisor.metrics_url}/{path}"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return response.status, await response.json()


async def test_full_pool_is_ready_regardless_of_last_poll(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full pool claims all that it can, so it is ready and must not be restarted."""
    monkeypatch.setattr("workpool.pool.status.POLL_SUCCESS_SECONDS", 0.0)
    may_end = asyncio.Event()

    @handler
    async def wait_until_test_allows_end(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue()
    async with make_pool(
        wait_until_test_allows_end, concurrency=1, metrics_listen="127.0.0.1:0"
    ) as supervisor:
        await recorder.wait_for(SessionStarted)
        assert await get_health_report(supervisor, "readyz") == (200, {"status": "ready"})
        may_end.set()
        await recorder.wait_for(SessionFinished)
        expected = {"status": "unready", "reasons": ["no successful poll in the last 0 s"]}
        async with asyncio.timeout(20):
            # The slot becomes free shortly after SessionFinished, so wait for the free slot.
            while await get_health_report(supervisor, "readyz") != (503, expected):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        assert await get_health_report(supervisor, "healthz") == (200, {"status": "healthy"})


async def test_pool_is_unhealthy_once_loop_has_been_blocked_for_max_block(
    control_plane: ControlPlane, make_settings: Callable[..., Settings]
) -> None:
    given_up, may_end = threading.Event(), threading.Event()

    @handler
    async def block_event_loop(_: Session) -> None:
        may_end.wait(50)  # This call blocks the event loop.

    control_plane.enqueue()
    settings = make_settings(max_block=1.5, metrics_listen="127.0.0.1:0")
    supervisor = Supervisor(settings, plugins=[block_event_loop])
    supervisor.on_blocked = given_up.set
    async with asyncio.TaskGroup() as group:
        try:
            group.create_task(asyncio.to_thread(asyncio.run, supervisor.run(until_empty=True)))
            assert await asyncio.to_thread(given_up.wait, 40)
            status, report = await get_health_report(supervisor, "healthz")
        finally:
            may_end.set()
    assert (status, report["status"]) == (503, "unhealthy")
    (reason,) = report["reasons"]
    assert "leases are not renewed: the handlers' event loop has been blocked" in reason
