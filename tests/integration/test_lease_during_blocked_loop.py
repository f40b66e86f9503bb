"""While a handler blocks its loop, its lease is renewed and the metrics can be read."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Session, Supervisor, handler
from workpool.events import SessionFinished
from workpool.testing import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Faults


class PoolOnThread:
    """A pool on a thread with an event loop of its own, so that handlers may block that loop."""

    def __init__(self, settings: Settings, call: Callable[[Session], Coroutine[Any, Any, None]]):
        self.recorder = Recorder()
        self.supervisor = Supervisor(settings, plugins=[handler(call), self.recorder])
        self.errors: list[str] = []

    async def run_pool(self) -> None:
        """Run the pool until the queue is empty and all sessions have ended."""
        await asyncio.to_thread(asyncio.run, self.supervisor.run(until_empty=True))

    @property
    def session_outcomes(self) -> list[str]:
        return [event.outcome for event in self.recorder.of(SessionFinished)]


async def fetch_text(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        assert response.status == 200
        return await response.text()


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_heartbeats_and_metrics_continue_while_handler_blocks_loop(
    control_plane: ControlPlane, faults: Faults, make_settings: Callable[..., Settings]
) -> None:
    blocked, may_end = threading.Event(), threading.Event()

    async def block_event_loop(_: Session) -> None:
        blocked.set()
        may_end.wait(50)  # This call blocks the event loop.

    (item,) = control_plane.enqueue()
    pool = PoolOnThread(make_settings(metrics_listen="127.0.0.1:0"), block_event_loop)
    async with asyncio.TaskGroup() as group:
        group.create_task(pool.run_pool())
        assert await asyncio.to_thread(blocked.wait, 40)
        await faults.wait_for("heartbeat", work_id=item.id, count=2, answered=True)
        assert pool.supervisor.metrics_url is not None
        text = await fetch_text(f"{pool.supervisor.metrics_url}/metrics")
        assert 'state="active"} 1.0' in text
        assert await fetch_text(f"{pool.supervisor.metrics_url}/healthz")
        may_end.set()
    assert pool.session_outcomes == ["completed"]


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_handler_that_blocks_event_loop_for_twice_the_lease_ttl_keeps_lease(
    control_plane: ControlPlane, faults: Faults, make_settings: Callable[..., Settings]
) -> None:
    started = threading.Event()

    async def block_event_loop(_: Session) -> None:
        started.set()
        time.sleep(45)  # noqa: ASYNC251 - blocking the loop is the point

    (item,) = control_plane.enqueue()
    pool = PoolOnThread(make_settings(lease_ttl=20, metrics_listen="127.0.0.1:0"), block_event_loop)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(pool.run_pool())
        assert await asyncio.to_thread(started.wait, 40)
        slowest = 0.0
        async with asyncio.timeout(75):
            while not running.done():
                if faults.of("stop"):
                    break
                before = time.monotonic()
                try:
                    await fetch_text(f"{pool.supervisor.metrics_url}/metrics")
                except aiohttp.ClientError:
                    # The metrics endpoint may close only after the pool has stopped its item.
                    assert faults.of("stop")
                slowest = max(slowest, time.monotonic() - before)
                await asyncio.sleep(0.5)
    assert slowest < 20
    assert pool.session_outcomes == ["completed"]
    kinds = [record.kind for record in control_plane.history.records_of_item(item.id)]
    assert "lapsed" not in kinds
    assert kinds.count("heartbeat") >= 5
    assert control_plane.summary().overlapping == 0
