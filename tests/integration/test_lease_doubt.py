"""Leases over a real socket that may be lost: lost answers, and items claimed by another worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from workpool import LeaseLost, Session, handler
from workpool.events import HeartbeatFinished, ItemReclaimed, SessionFinished, SessionStarted
from workpool.pool import lease, supervisor
from workpool.pool.lease import lease_clock
from workpool.testing import garbled, lost, reset, status
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Clock, Faults, Recorder

OURS_IN_DOUBT = [lost(), reset(), garbled(), status(502, html=True, applied=True)]
IDS = ["closed", "reset", "garbled", "502"]


@pytest.fixture
async def other_worker(make_settings: Callable[..., Settings]) -> AsyncIterator[WorkClient]:
    """Return the client of another worker."""
    async with WorkClient(make_settings(), worker_id="rival") as client:
        yield client


@pytest.fixture
def take_over(clock: Clock, other_worker: WorkClient) -> Callable[[str], Awaitable[None]]:
    """Let the pool's lease expire at the control plane and another worker claim the item."""

    async def claim_as_other_worker(work_id: str) -> None:
        clock.advance(1_000)
        item = await other_worker.poll()
        assert item is not None
        assert item.id == work_id
        await other_worker.ack(work_id)
        await other_worker.heartbeat(work_id)

    return claim_as_other_worker


def heartbeat_results(recorder: Recorder) -> list[str]:
    return [event.result for event in recorder.of(HeartbeatFinished)]


@pytest.mark.parametrize("fault", OURS_IN_DOUBT, ids=IDS)
async def test_unanswered_first_heartbeat_that_was_applied_is_recovered(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, fault: Any
) -> None:
    faults.add(fault, "heartbeat", times=1)

    @handler
    async def work(_: Session) -> None:
        return

    control_plane.enqueue()
    async with make_pool(work, lease_ttl=10):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert heartbeat_results(recorder)[:3] == ["transient", "recovered", "ok"]
    assert not recorder.of(ItemReclaimed)
    assert len(faults.of("get")) == 1


@pytest.mark.parametrize("fault", OURS_IN_DOUBT, ids=IDS)
async def test_unanswered_later_heartbeat_that_was_applied_does_not_affect_handler(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
) -> None:
    monkeypatch.setattr(lease, "RENEW_PART", 100)  # one heartbeat every tenth of a second
    may_end = asyncio.Event()

    @handler
    async def work(_: Session) -> None:
        await may_end.wait()

    control_plane.enqueue()
    async with make_pool(work, lease_ttl=10):
        await recorder.wait_for(SessionStarted)
        rule = faults.add(fault, "heartbeat", times=1)
        await recorder.wait_for(HeartbeatFinished, lambda event: event.result == "recovered")
        seen = len(heartbeat_results(recorder))
        await recorder.wait_for(HeartbeatFinished, count=seen + 2)
        assert rule.hits == 1
        assert set(heartbeat_results(recorder)[seen:]) == {"ok"}
        may_end.set()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"


async def test_handler_whose_item_another_worker_holds_is_cancelled_and_sends_nothing(
    control_plane: ControlPlane,
    take_over: Callable[[str], Awaitable[None]],
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "RENEW_PART", 20)
    errors: list[BaseException] = []

    @handler
    async def work(session: Session) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await session.update_metadata({"too": "late"})
            except LeaseLost as error:
                errors.append(error)

    (item,) = control_plane.enqueue()
    # all slots are used, so it does not poll
    async with make_pool(work, lease_ttl=10, concurrency=1):
        await recorder.wait_for(SessionStarted)
        await take_over(item.id)
        finished = await recorder.wait_for(SessionFinished)
        taken = len(control_plane.history)
    assert finished.outcome == "lease_lost"
    assert len(errors) == 1
    (lost_to,) = recorder.of(ItemReclaimed)
    assert (lost_to.direction, lost_to.stage) == ("lost", "run")
    assert heartbeat_results(recorder)[-1] == "precondition"
    after = list(control_plane.history)[taken:]
    assert not [record for record in after if record.work_id == item.id]
    assert control_plane.summary().overlapping == 0
    assert control_plane.operations.get_item(control_plane.environments[0], item.id).metadata == {}


async def test_machine_that_slept_beyond_ttl_sends_nothing_after_waking(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease clock counts sleep, but the clocks and timers of the loops do not."""
    slept = 0.0
    monkeypatch.setattr(supervisor.Supervisor, "_clock", lambda _: lease_clock() + slept)
    errors: list[BaseException] = []
    woken = asyncio.Event()

    @handler
    async def work(session: Session) -> None:
        await woken.wait()
        try:
            await session.update_metadata({"too": "late"})
        except LeaseLost as error:
            errors.append(error)
        await asyncio.Event().wait()

    (item,) = control_plane.enqueue()
    async with make_pool(work):
        await recorder.wait_for(SessionStarted)
        sent = len(faults.of(work_id=item.id))
        slept = 61.0
        woken.set()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "lease_lost"
    assert len(errors) == 1
    assert len(faults.of(work_id=item.id)) == sent
    assert not recorder.of(ItemReclaimed)  # the loss was not confirmed by the control plane
