"""Leases that may be lost: heartbeats without an answer, and items that another worker claims."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool import LeaseLost, Session, handler
from workpool.events import HeartbeatFinished, ItemReclaimed, SessionFinished, SessionStarted
from workpool.pool import supervisor
from workpool.pool.machine_pauses import lease_clock
from workpool.testing import Hold, garbled, lost, reset, status
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Clock, Faults, Recorder

UNANSWERED_FAULTS = [lost(), reset(), garbled(), status(502, html=True, applied=True)]
FAULT_IDS = ["closed", "reset", "garbled", "502"]


@pytest.fixture
async def other_worker(make_settings: Callable[..., Settings]) -> AsyncIterator[WorkClient]:
    """Return the client of another worker."""
    async with WorkClient(make_settings(), worker_id="rival") as client:
        yield client


@pytest.fixture
def let_other_worker_take_over(
    clock: Clock, other_worker: WorkClient
) -> Callable[[str], Awaitable[None]]:
    """Return a function that ends the lease of an item and lets another worker claim it."""

    async def take_item_over(work_id: str) -> None:
        clock.advance(1_000)
        item = await other_worker.poll()
        assert item is not None
        assert item.id == work_id
        await other_worker.ack(work_id)
        await other_worker.heartbeat(work_id)

    return take_item_over


def list_heartbeat_results(recorder: Recorder) -> list[str]:
    return [event.result for event in recorder.of(HeartbeatFinished)]


@pytest.mark.parametrize("fault", UNANSWERED_FAULTS, ids=FAULT_IDS)
async def test_lease_survives_first_heartbeat_that_was_applied_but_not_answered(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, fault: Any
) -> None:
    faults.add(fault, "heartbeat", times=1)

    @handler
    async def return_at_once(_: Session) -> None:
        return

    control_plane.enqueue()
    async with make_pool(return_at_once):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert list_heartbeat_results(recorder)[:3] == ["transient", "recovered", "ok"]
    assert not recorder.of(ItemReclaimed)
    assert len(faults.of("get")) == 1


@pytest.mark.usefixtures("frequent_heartbeats")
@pytest.mark.parametrize("fault", UNANSWERED_FAULTS, ids=FAULT_IDS)
async def test_later_heartbeat_that_was_applied_but_not_answered_does_not_affect_handler(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    fault: Any,
) -> None:
    may_end = asyncio.Event()

    @handler
    async def wait_until_test_allows_end(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue()
    async with make_pool(wait_until_test_allows_end):
        await recorder.wait_for(SessionStarted)
        rule = faults.add(fault, "heartbeat", times=1)
        await recorder.wait_for(HeartbeatFinished, lambda event: event.result == "recovered")
        seen = len(list_heartbeat_results(recorder))
        await recorder.wait_for(HeartbeatFinished, count=seen + 2)
        assert rule.hits == 1
        assert set(list_heartbeat_results(recorder)[seen:]) == {"ok"}
        may_end.set()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_handler_is_cancelled_and_sends_nothing_if_another_worker_holds_its_item(
    control_plane: ControlPlane,
    faults: Faults,
    let_other_worker_take_over: Callable[[str], Awaitable[None]],
    make_pool: Any,
    recorder: Recorder,
) -> None:
    hold = Hold()
    errors: list[BaseException] = []

    @handler
    async def write_metadata_when_cancelled(session: Session) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await session.update_metadata({"too": "late"})
            except LeaseLost as error:
                errors.append(error)

    (item,) = control_plane.enqueue()
    # The session occupies the pool's only slot. So the pool does not poll, and only the other
    # worker can claim the item again.
    async with make_pool(write_metadata_when_cancelled, concurrency=1):
        await recorder.wait_for(SessionStarted)
        faults.add(hold, "heartbeat", times=1)
        await hold.reached()
        await let_other_worker_take_over(item.id)
        hold.release()
        finished = await recorder.wait_for(SessionFinished)
        taken = len(control_plane.history)
    assert finished.outcome == "lease_lost"
    assert len(errors) == 1
    (lost_to,) = recorder.of(ItemReclaimed)
    assert (lost_to.direction, lost_to.stage) == ("lost", "run")
    assert list_heartbeat_results(recorder)[-1] == "precondition"
    after = list(control_plane.history)[taken:]
    assert not [record for record in after if record.work_id == item.id]
    assert control_plane.summary().overlapping == 0
    assert control_plane.operations.get_item(control_plane.environments[0], item.id).metadata == {}


async def test_session_sends_nothing_for_item_after_machine_slept_longer_than_ttl(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a machine sleeps, the lease clock goes on, but the timers of event loops stop."""
    slept = 0.0
    monkeypatch.setattr(supervisor.Supervisor, "_clock", lambda _: lease_clock() + slept)
    errors: list[BaseException] = []
    woken = asyncio.Event()

    @handler
    async def write_metadata_after_wake_up(session: Session) -> None:
        await woken.wait()
        try:
            await session.update_metadata({"too": "late"})
        except LeaseLost as error:
            errors.append(error)
        await asyncio.Event().wait()

    (item,) = control_plane.enqueue()
    async with make_pool(write_metadata_after_wake_up):
        await recorder.wait_for(SessionStarted)
        sent = len(faults.of(work_id=item.id))
        slept = 61.0
        woken.set()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "lease_lost"
    assert len(errors) == 1
    assert len(faults.of(work_id=item.id)) == sent
    assert not recorder.of(ItemReclaimed)
