"""The limits after which a pool ends by itself. See workpool/docs/semantics.md, "Limits"."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.shared_handlers import GatedHandler, return_at_once
from workpool.events import (
    DrainFinished,
    DrainStarted,
    ItemReceived,
    PollFinished,
    SessionFinished,
    SessionStarted,
)
from workpool.pool import supervisor as supervisor_module
from workpool.pool.admission import Admission
from workpool.pool.exit_limits import ExitLimits
from workpool.pool.shared_slots import SharedPoolResources, SharedSlots
from workpool.testing import Hold, in_virtual_time, status
from workpool.wire.protocol import HEALTHCHECK

if TYPE_CHECKING:
    from tests.integration.shared_handlers import UncancellableHandler
    from workpool import Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Kit, Recorder

WAIT_SECONDS = 20.0
"""Maximum time for the end of a pool that should end by itself."""


async def wait_for_pool_end(supervisor: Supervisor) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        await supervisor.wait()


def session_count(recorder: Recorder) -> int:
    return len(recorder.of(SessionFinished))


def item_states(plane: ControlPlane, items: Any) -> list[str]:
    return [plane.operations.get_item(plane.environments[0], item.id).state for item in items]


@pytest.mark.parametrize(
    "case",
    [(1, 1, 0, 1), (1, 8, 0, 3), (3, 2, 0, 2), (3, 8, 4, 3), (2, 1, 3, 2)],
)
async def test_pool_ends_at_exit_limit_of_sessions_and_claims_no_more_items(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    case: tuple[int, int, int, int],
) -> None:
    items = control_plane.enqueue(6)
    limit, concurrency, prefetch, pollers = case
    sizes = {"concurrency": concurrency, "prefetch": prefetch, "pollers": pollers}
    async with make_pool(return_at_once, exit_after_sessions=limit, **sizes) as supervisor:
        await wait_for_pool_end(supervisor)
    assert session_count(recorder) == limit
    assert len(faults.of("ack")) == limit
    assert (
        sorted(item_states(control_plane, items)) == ["queued"] * (6 - limit) + ["stopped"] * limit
    )
    assert recorder.of(DrainFinished)[0].result == "clean"
    assert supervisor.abandoned == 0


async def test_last_session_before_exit_is_neither_interrupted_nor_limited_by_drain_timeout(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(2)
    gate = GatedHandler()
    async with make_pool(gate, exit_after_sessions=1, drain_timeout=0) as supervisor:
        await recorder.wait_for(SessionStarted)
        assert supervisor.status().reasons == ("ending: exit_after_sessions",)
        assert not supervisor.status().draining
        gate.may_end.set()
        await wait_for_pool_end(supervisor)
    assert gate.interrupted == [False]
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["completed"]
    assert [event.timeout for event in recorder.of(DrainStarted)] == [None]


async def test_drain_with_timeout_zero_releases_session_that_runs_after_exit_limit_is_reached(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    async with make_pool(GatedHandler(), exit_after_sessions=1) as supervisor:
        await recorder.wait_for(SessionStarted)
        async with asyncio.timeout(WAIT_SECONDS):
            await supervisor.drain(timeout=0)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["released"]


@pytest.mark.parametrize("code", [409, 404])
async def test_item_lost_at_ack_does_not_count_towards_exit_limit_of_sessions(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, code: int
) -> None:
    items = control_plane.enqueue(3)
    faults.add(status(code), "ack", times=1)
    async with make_pool(return_at_once, exit_after_sessions=1, pollers=3) as supervisor:
        await wait_for_pool_end(supervisor)
    assert session_count(recorder) == 1
    assert item_states(control_plane, items).count("stopped") == 1


async def test_item_lost_at_first_heartbeat_does_not_count_towards_exit_limit_of_sessions(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(2)
    faults.add(status(404), "heartbeat", times=1)
    async with make_pool(return_at_once, exit_after_sessions=1) as supervisor:
        await wait_for_pool_end(supervisor)
    outcomes = [event.outcome for event in recorder.of(SessionFinished)]
    assert outcomes == ["lease_lost", "completed"]


async def test_health_check_item_does_not_count_towards_exit_limit_of_sessions(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    (check,) = control_plane.enqueue(work_type=HEALTHCHECK)
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once, exit_after_sessions=1, concurrency=1) as supervisor:
        await wait_for_pool_end(supervisor)
    assert item_states(control_plane, [check, item]) == ["stopped", "stopped"]
    assert session_count(recorder) == 1


async def test_pool_with_idle_time_limit_stays_ready_while_session_runs(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    gate = GatedHandler()
    async with make_pool(gate, exit_after_idle=0.1, block_ms=10) as supervisor:
        await recorder.wait_for(SessionStarted)
        await recorder.wait_for(PollFinished, lambda event: event.result == "null", count=20)
        assert supervisor.status().ready
        gate.may_end.set()
        await wait_for_pool_end(supervisor)
    assert [event.outcome for event in recorder.of(SessionFinished)] == ["completed"]
    assert len(recorder.of(ItemReceived)) == 1


async def test_pool_that_stays_idle_ends_although_exit_limit_of_sessions_is_not_reached(
    make_pool: Any, recorder: Recorder
) -> None:
    limits = {"exit_after_sessions": 1, "exit_after_idle": 0.05}
    async with make_pool(return_at_once, block_ms=10, **limits) as supervisor:
        await wait_for_pool_end(supervisor)
    assert not recorder.of(ItemReceived)
    assert not supervisor.abandoned


@in_virtual_time
async def test_exit_after_uptime_stops_claims_but_lets_running_session_complete(
    workpool: Kit,
) -> None:
    first, *others = workpool.enqueue(count=3)
    gate = GatedHandler()
    sizes = {"concurrency": 1, "prefetch": 2, "drain_timeout": 0}
    async with workpool.pool(gate, exit_after_uptime=20, **sizes) as supervisor:
        await workpool.wait_for(SessionStarted)
        await asyncio.sleep(21)
        assert supervisor.status().reasons == ("ending: exit_after_uptime",)
        assert supervisor.status().waiting == 0
        gate.may_end.set()
        await wait_for_pool_end(supervisor)
    assert gate.interrupted == [False]
    states = [workpool.item(item).state for item in (first, *others)]
    assert states == ["stopped", "queued", "queued"]


async def test_item_delivered_after_exit_limit_is_reached_is_not_claimed(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    hold = Hold(applied=True)
    faults.add(hold, "poll")
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once, exit_after_uptime=3.0) as supervisor:
        await hold.reached()
        await wait_for_pool_end(supervisor)
    assert not recorder.of(ItemReceived)
    assert item_states(control_plane, [item]) == ["queued"]


async def test_pool_whose_last_handler_is_stuck_ends_after_exit_limit(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    uncancellable_handler: UncancellableHandler,
) -> None:
    monkeypatch.setattr("workpool.pool.handler_executor.REPEAT_SECONDS", 0.05)
    (item,) = control_plane.enqueue()
    limits = {"exit_after_sessions": 1, "session_timeout": 0.05}
    async with make_pool(uncancellable_handler, **limits) as supervisor:
        await wait_for_pool_end(supervisor)
    uncancellable_handler.may_end.set()
    assert supervisor.abandoned == 1
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert (
        "workpool.released"
        in control_plane.operations.get_item(control_plane.environments[0], item.id).metadata
    )


async def test_failed_pool_frees_its_shared_slots_and_counts_as_idle(
    control_plane: ControlPlane, make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_crash = asyncio.Event()

    async def wait_and_raise_error(_: object) -> None:
        await may_crash.wait()
        raise RuntimeError("a bug")

    async def run_pool_until_error() -> None:
        with pytest.raises(RuntimeError, match="a bug"):
            await supervisor.run()

    monkeypatch.setattr(supervisor_module, "read_remote_stats", wait_and_raise_error)
    sizes = {"concurrency": 1, "prefetch": 1, "pollers": 1, "stats_interval": 30}
    supervisor = make_pool(GatedHandler(), exit_after_idle=0.001, **sizes)
    share, limits = SharedSlots(4).add_environment_share(), ExitLimits(supervisor.settings)
    supervisor.shared = SharedPoolResources(share, limits, None)
    control_plane.enqueue(2)
    async with asyncio.timeout(2 * WAIT_SECONDS), asyncio.TaskGroup() as group:
        group.create_task(run_pool_until_error())
        while supervisor.status().waiting == 0:  # noqa: ASYNC110 - no event for a waiting item
            await asyncio.sleep(0.01)
        may_crash.set()
    assert share.taken == 0
    note_poll, idle = limits.include_pool_in_idle_limit(Admission(lambda: 0.0)), True
    note_poll(idle)
    # The time between the two polls must exceed `exit_after_idle`, which is 0.001 s.
    await asyncio.sleep(0.01)
    note_poll(idle)
    assert limits.reached == "exit_after_idle"
