"""The first beat is the handlers' loop's; the keeper takes over what that loop cannot settle."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Settings, Supervisor, WorkClient, handler
from workpool.events import HeartbeatFinished, SessionFinished
from workpool.testing import Hold, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.server import ControlPlane
    from workpool.testing import Faults
    from workpool.wire.items import Heartbeat


@pytest.fixture(autouse=True)
def patient_keeper() -> None:
    """It takes over as soon as it would for a user."""


@handler
async def nothing(_: Session) -> None:
    """End at once."""


async def test_a_short_session_needs_nothing_of_the_keepers_thread(
    plane: ControlPlane, make_settings: Callable[..., Settings]
) -> None:
    beats: list[str] = []

    class Counting(WorkClient):
        async def heartbeat(self, *args: Any, **named: Any) -> Heartbeat:
            beats.append(threading.current_thread().name)
            return await super().heartbeat(*args, **named)

    plane.enqueue(20)
    pool = Supervisor(make_settings(), plugins=[nothing], connect=Counting)
    await pool.run(until_empty=True)
    assert beats == [threading.current_thread().name] * 20


async def test_a_loop_blocked_while_the_first_beat_is_under_way_loses_no_lease(
    plane: ControlPlane, faults: Faults, make_settings: Callable[..., Settings]
) -> None:
    """Its answer waits unread; the server counts from when it was applied."""
    under_way, may_end = threading.Event(), threading.Event()
    hold = Hold(applied=True)

    @handler(metadata={"kind": "blocker"})
    async def block(_: Session) -> None:
        await asyncio.to_thread(under_way.wait, 20)
        may_end.wait(20)  # not awaited: nothing else runs on this loop

    [blocker] = plane.enqueue(metadata={"kind": "blocker"})
    recorder = Recorder()
    settings = make_settings(lease_ttl=10, pollers=1)
    pool = Supervisor(settings, plugins=[block, nothing, recorder])
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(asyncio.run, pool.run(until_empty=True)))
        await faults.wait_for("heartbeat", work_id=blocker.id, answered=True)
        [late] = plane.enqueue()
        faults.add(hold, "heartbeat", times=1, where=lambda request: late.id in request.path)
        plane.operations.wake()
        await hold.reached()
        under_way.set()
        # 412 at first, since the held one was applied; then, the item read, from what it says.
        await faults.wait_for("heartbeat", work_id=late.id, count=3, answered=True)
        hold.release()
        may_end.set()
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["completed", "completed"]
    results = [e.result for e in recorder.of(HeartbeatFinished) if e.item.id == late.id]
    assert "recovered" in results


async def test_a_first_beat_that_crashes_is_sent_again(
    plane: ControlPlane, make_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    crashes = iter([True])

    class Crashing(WorkClient):
        async def heartbeat(self, *args: Any, **named: Any) -> Heartbeat:
            if next(crashes, False):
                raise ZeroDivisionError
            return await super().heartbeat(*args, **named)

    plane.enqueue()
    recorder = Recorder()
    pool = Supervisor(make_settings(), plugins=[nothing, recorder], connect=Crashing)
    await pool.run(until_empty=True)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["completed"]
    assert "first beat crashed" in caplog.text
