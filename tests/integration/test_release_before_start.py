"""Items released by a drain before their handler started, such as those with an ack in flight."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, handler
from workpool.events import DrainStarted, SessionStarted
from workpool.testing import Hold
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from workpool import Settings, Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Clock, Faults, Recorder


@handler
async def endless_handler(_: Session) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def worker_losing_item(make_settings: Callable[..., Settings]) -> AsyncIterator[WorkClient]:
    """Return the client of another worker, which claims the item first and loses it."""
    async with WorkClient(make_settings(), worker_id="former") as client:
        yield client


@pytest.fixture
def pool_drained_during_ack(faults: Faults, make_pool: Any, recorder: Recorder) -> Any:
    """Return a context manager that runs a pool and drains it while its ack is in flight."""

    @asynccontextmanager
    async def run_pool_and_drain() -> AsyncIterator[Supervisor]:
        ack = Hold()
        faults.add(ack, "ack", where=lambda request: request.worker_id != "former")
        async with make_pool(endless_handler) as supervisor:
            await ack.reached()
            async with asyncio.TaskGroup() as group:
                group.create_task(supervisor.drain())
                await recorder.wait_for(DrainStarted)
                ack.release()
                yield supervisor

    return run_pool_and_drain


async def test_redelivered_item_acknowledged_during_drain_is_released(
    control_plane: ControlPlane,
    worker_losing_item: WorkClient,
    clock: Clock,
    pool_drained_during_ack: Any,
    wait_for_session_end: Any,
    recorder: Recorder,
) -> None:
    """After the last heartbeat the pool writes nothing, not even the number of the attempt."""
    (item,) = control_plane.enqueue()
    await worker_losing_item.poll()
    await worker_losing_item.ack(item.id)
    clock.advance(100)
    async with pool_drained_during_ack():
        pass
    final = await wait_for_session_end(item.id)
    assert final.outcome == "released"
    assert not recorder.of(SessionStarted)
    assert final.request_names[-1] == "heartbeat"
    assert final.sent[-1].query["desired_ttl_seconds"] == "10"


async def test_item_acknowledged_during_drain_counts_as_stopped_if_stop_was_requested(
    control_plane: ControlPlane,
    pool_drained_during_ack: Any,
    faults: Faults,
    wait_for_session_end: Any,
    recorder: Recorder,
) -> None:
    """No other worker gets the item, because it becomes `stopped` when its lease expires."""
    (item,) = control_plane.enqueue()
    heartbeat = Hold()
    faults.add(heartbeat, "heartbeat")
    async with pool_drained_during_ack():
        await heartbeat.reached()
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat.release()
    final = await wait_for_session_end(item.id)
    assert final.outcome == "stopped"
    assert not recorder.of(SessionStarted)


async def test_session_outcome_is_stopped_if_stop_request_precedes_drain(
    control_plane: ControlPlane,
    make_pool: Any,
    faults: Faults,
    wait_for_session_end: Any,
    recorder: Recorder,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(endless_handler) as supervisor:
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        await supervisor.drain(timeout=0)
    final = await wait_for_session_end(item.id)
    assert final.outcome == "stopped"
    assert faults.of("heartbeat")
