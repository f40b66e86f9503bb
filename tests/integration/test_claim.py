"""Claims: items that a pool acknowledges, declines, or drops as duplicates.

See workpool/docs/architecture.md, "The path of one item".
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool import PluginError, Release, Session, SettingsError, Supervisor, handler, hookimpl
from workpool.events import (
    AckFinished,
    ItemDeclined,
    ItemReceived,
    ItemReclaimed,
    PluginFailed,
    PollerRestarted,
    PollFinished,
    SessionFinished,
    SessionStarted,
)
from workpool.server import Poll
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import Hold, expire_lease, literal, status
from workpool.testing.bounded_wait import BoundedCondition

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool import WorkItem
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder
    from workpool.testing.fault_rules import Request


class SessionCountingHandler:
    """A handler that counts its sessions, and lets them end when the test sets `opened`."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.running = self.most = self.runs = 0
        self._changes = BoundedCondition()

    @handler
    async def count_session_and_wait(self, _: Session) -> None:
        self.running += 1
        self.runs += 1
        self.most = max(self.most, self.running)
        self._changes.notify_all()
        try:
            await self.opened.wait()
        finally:
            self.running -= 1

    async def wait_for_sessions(self, count: int) -> None:
        await self._changes.wait_until(lambda: self.running >= count, lambda: f"{self.running} run")


@pytest.fixture(autouse=True)
def short_backoff_between_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.poller.BACKOFF_SECONDS", 0.01)


@handler
async def return_at_once(_: Session) -> None:
    pass


def make_item_body(plane: ControlPlane, work_id: str, **changes: Any) -> bytes:
    item = DIALECTS["qoder"].item_json(plane.operations.get_item(plane.environments[0], work_id))
    return orjson.dumps({**item, **changes})


def is_request_for_item(work_id: str) -> Callable[[Request], bool]:
    return lambda request: request.work_id == work_id


def count_held_items(plane: ControlPlane) -> int:
    """Count the items that were delivered to or acknowledged by the pool and are not stopped."""
    items = plane.operations.list_items(plane.environments[0], 100).items
    return sum(
        item.delivered_at is not None or item.state in {"starting", "active"} for item in items
    )


@pytest.mark.parametrize("shape", [(1, 0, 3), (2, 0, 4), (2, 3, 3)])
async def test_number_of_claimed_items_never_exceeds_slots_plus_prefetch(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, shape: Any
) -> None:
    concurrency, prefetch, pollers = shape
    gate, places = SessionCountingHandler(), concurrency + prefetch
    control_plane.enqueue(places + 10)
    pool = make_pool(gate, concurrency=concurrency, prefetch=prefetch, pollers=pollers)
    async with pool as supervisor:
        await recorder.wait_for(ItemReceived, count=places)
        await gate.wait_for_sessions(concurrency)
        status = supervisor.status()
        assert (status.running, status.waiting, status.capacity) == (concurrency, prefetch, places)
        assert status.ready
        polls = len(faults.of("poll"))
        assert polls == count_held_items(control_plane) == places
        gate.opened.set()
        await recorder.wait_for(SessionFinished, count=places + 10)
    assert gate.most == concurrency
    assert control_plane.summary().stopped == places + 10


async def test_poller_without_free_slot_does_not_poll(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    """The first poll reserves the only slot, so the other two pollers wait."""
    gate, hold = SessionCountingHandler(), Hold()
    faults.add(hold, "poll")
    control_plane.enqueue(3)
    async with make_pool(gate, pollers=3, concurrency=1):
        await hold.reached()
        hold.release()
        await gate.wait_for_sessions(1)
        assert len(faults.of("poll")) == 1
        gate.opened.set()


async def test_duplicate_delivery_of_waiting_item_is_dropped(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    gate = SessionCountingHandler()
    first, second = control_plane.enqueue(2)
    faults.add(literal(lambda: make_item_body(control_plane, second.id)), "poll", skip=2, times=1)
    async with make_pool(gate, concurrency=1, prefetch=2, block_ms=20):
        copy = await recorder.wait_for(ItemReceived, lambda event: event.origin == "duplicate")
        gate.opened.set()
        await recorder.wait_for(SessionFinished, count=2)
    assert copy.item.id == second.id
    assert gate.runs == 2
    for item in (first, second):
        assert [request.op for request in faults.of(work_id=item.id)] == [
            "ack", "heartbeat", "stop",
        ]  # fmt: skip


async def test_duplicate_delivery_of_running_item_causes_heartbeat_and_no_second_run(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    heartbeat_now: Any,
) -> None:
    gate = SessionCountingHandler()
    (item,) = control_plane.enqueue()
    async with make_pool(gate, block_ms=20):
        await recorder.wait_for(SessionStarted)
        heartbeat_now(item.id)
        await faults.wait_for("heartbeat", count=2)
        assert gate.running == 1
        gate.opened.set()
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert (gate.runs, len(faults.of("ack"))) == (1, 1)
    assert [event.origin for event in recorder.of(ItemReceived)] == ["new", "duplicate"]
    assert not recorder.of(ItemReclaimed)


async def test_duplicate_delivery_of_completing_item_is_dropped(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    heartbeat_now: Any,
) -> None:
    hold = Hold()
    faults.add(hold, "stop")
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once, block_ms=20):
        await hold.reached()
        heartbeat_now(item.id)
        await recorder.wait_for(ItemReceived, lambda event: event.origin == "duplicate")
        hold.release()
        await recorder.wait_for(SessionFinished)
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat", "stop"]


async def test_released_item_delivered_again_is_run_again(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    """The pool must not take the second delivery for a duplicate."""
    runs = 0

    @handler
    async def release_first_session(_: Session) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise Release

    (item,) = control_plane.enqueue()
    async with make_pool(release_first_session, block_ms=20):
        await recorder.wait_for(SessionFinished)
        expire_lease(control_plane, item.id)
        last = await recorder.wait_for(SessionFinished, count=2)
    assert last.outcome == "completed"
    assert last.session.redelivered
    assert [event.origin for event in recorder.of(ItemReceived)] == ["new", "redelivered"]
    assert len(faults.of("ack")) == 2


async def test_second_item_of_running_session_is_not_acknowledged(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    gate = SessionCountingHandler()
    (first,) = control_plane.enqueue()
    (second,) = control_plane.enqueue(session_id=first.session_id)
    async with make_pool(gate, block_ms=20, reclaim_older_than_ms=30):
        declined = await recorder.wait_for(ItemDeclined, count=2)
        assert (declined.item.id, declined.reason) == (second.id, "busy")
        assert not faults.of("ack", work_id=second.id)
        gate.opened.set()
        await recorder.wait_for(SessionFinished, count=2)
    assert gate.most == 1
    assert control_plane.summary().stopped == 2


class ItemSelectingPlugin:
    """A plugin that accepts some items, declines others and raises an error for the rest."""

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> Any:
        if item.metadata.get("for") == "broken":
            raise RuntimeError("a bug in the plugin")
        return return_at_once if item.metadata.get("for") == "us" else None


@pytest.mark.parametrize("whose", ["others", "broken"])
async def test_unwanted_item_stays_queued_and_is_logged_once(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder,
    caplog: pytest.LogCaptureFixture, whose: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "workpool")
    (item,) = control_plane.enqueue(metadata={"for": whose})
    async with make_pool(ItemSelectingPlugin(), block_ms=20, reclaim_older_than_ms=100):
        declined = await recorder.wait_for(ItemDeclined, count=3)
        control_plane.enqueue(metadata={"for": "us"})
        await recorder.wait_for(SessionFinished)
    reason = "unwanted" if whose == "others" else "plugin_error"
    assert (declined.item.id, declined.reason) == (item.id, reason)
    assert not faults.of(work_id=item.id)
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "queued"
    )
    logged = [record for record in caplog.records if "item declined" in record.message]
    assert len(logged) == 1
    if whose == "broken":
        assert recorder.of(PluginFailed)[0].hook == "workpool_session_handler"


async def test_pool_waits_between_polls_that_return_only_unwanted_items(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(metadata={"for": "others"})
    started = time.monotonic()
    async with make_pool(ItemSelectingPlugin(), block_ms=100, reclaim_older_than_ms=0):
        await recorder.wait_for(ItemDeclined, count=4)
        assert time.monotonic() - started > 0.29


async def test_item_of_busy_handler_is_declined_if_redelivery_is_too_near_to_set_it_aside(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    opened = asyncio.Event()

    @handler(max_sessions=2)
    async def handler_limited_to_two_sessions(_: Session) -> None:
        await opened.wait()

    control_plane.enqueue(3)
    async with make_pool(handler_limited_to_two_sessions, block_ms=20, reclaim_older_than_ms=30):
        declined = await recorder.wait_for(ItemDeclined)
        assert declined.reason == "busy"
        await recorder.wait_for(SessionStarted, count=2)
        assert not faults.of("ack", work_id=declined.item.id)
        assert len(recorder.of(SessionStarted)) == 2
        opened.set()
        await recorder.wait_for(SessionFinished, count=3)
    assert control_plane.summary().stopped == 3


@pytest.mark.parametrize(
    ("op", "code"), [("ack", 404), ("ack", 409), ("heartbeat", 404), ("heartbeat", 412)]
)
async def test_pool_waits_between_polls_while_items_cannot_be_claimed(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    op: Any,
    code: int,
) -> None:
    faults.add(status(code), op, times=7)
    control_plane.enqueue(count=9)
    started = time.monotonic()
    async with make_pool(return_at_once, concurrency=1, block_ms=200):
        await recorder.wait_for(SessionFinished, lambda event: event.outcome == "completed")
        # The pool waits for 0.2 s before each of three polls, so all polls take at least 0.6 s.
        assert time.monotonic() - started > 0.59


async def test_pool_waits_between_polls_while_only_health_checks_arrive(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    control_plane.enqueue(count=7, work_type="healthcheck")
    started = time.monotonic()
    async with make_pool(return_at_once, concurrency=1, block_ms=200):
        await faults.wait_for("stop", count=7)
        # The pool waits for 0.2 s before each of three polls, so all polls take at least 0.6 s.
        assert time.monotonic() - started > 0.59


async def test_health_check_item_is_stopped_without_heartbeat_or_session(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    (item,) = control_plane.enqueue(work_type="healthcheck")
    async with make_pool(return_at_once):
        await faults.wait_for("stop", answered=True)
        await recorder.wait_for(AckFinished)
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "stop"]
    assert faults.of("stop")[0].body == {"force": True}
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "stopped"
    )
    assert not recorder.of(SessionStarted)
    assert not recorder.of(SessionFinished)


async def test_health_check_item_is_stopped_although_plugin_declines_items(
    control_plane: ControlPlane, faults: Faults, make_pool: Any
) -> None:
    control_plane.enqueue(work_type="healthcheck")
    async with make_pool(ItemSelectingPlugin()):
        await faults.wait_for("stop", answered=True)


async def test_item_of_unknown_type_is_offered_to_plugins(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    @handler(type="index")
    async def handle_item_of_type_index(_: Session) -> dict[str, str]:
        return {"indexed": "yes"}

    (other,) = control_plane.enqueue(work_type="unheard_of")
    (ours,) = control_plane.enqueue(work_type="index")
    async with make_pool(handle_item_of_type_index, block_ms=20):
        finished = await recorder.wait_for(SessionFinished)
        declined = await recorder.wait_for(ItemDeclined)
    assert finished.session.item.id == ours.id
    assert (declined.item.id, declined.reason) == (other.id, "unwanted")


async def test_items_of_custom_type_that_have_no_session_id_run_concurrently(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    opened = asyncio.Event()

    @handler(type="index")
    async def wait_until_test_allows_end(_: Session) -> None:
        await opened.wait()

    items = control_plane.enqueue(2, work_type="index")
    for number, item in enumerate(items):
        bare = make_item_body(control_plane, item.id, data={"type": "index"})
        faults.add(literal(bare), "poll", skip=number, times=1)
        acked = make_item_body(control_plane, item.id, data={"type": "index"}, state="starting")
        faults.add(literal(acked, applied=True), "ack", where=is_request_for_item(item.id))
    async with make_pool(wait_until_test_allows_end, block_ms=20):
        await recorder.wait_for(SessionStarted, count=2)
        assert not recorder.of(ItemDeclined)
        opened.set()
        await recorder.wait_for(SessionFinished, count=2)


MALFORMED = {
    "no_id": {"id": None},
    "a_path_for_an_id": {"id": "../../x"},
    "no_data": {"data": None},
    "a_session_without_an_id": {"data": {"type": "session"}},
    "an_unknown_state": {"state": "levitating"},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_item_does_not_crash_poller(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, changes: Any
) -> None:
    (item,) = control_plane.enqueue()
    faults.add(literal(make_item_body(control_plane, item.id, **changes)), "poll", times=2)
    async with make_pool(return_at_once, block_ms=20, pollers=1):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert not recorder.of(PollerRestarted)
    assert [event.result for event in recorder.of(PollFinished)][:3] == ["error", "error", "item"]


INFORMATION_ONLY: dict[str, dict[str, Any]] = {
    "time_without_a_zone": {"created_at": "2026-03-01 12:00:00"},
    "unreadable_time": {"created_at": "yesterday"},
    "no_time": {"created_at": None},
    "metadata_of_numbers": {"metadata": {"a": 1}},
}


@pytest.mark.parametrize("changes", INFORMATION_ONLY.values(), ids=INFORMATION_ONLY)
async def test_item_with_invalid_creation_time_or_metadata_is_run(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, changes: Any
) -> None:
    (item,) = control_plane.enqueue()
    faults.add(
        literal(make_item_body(control_plane, item.id, **changes), applied=True), "poll", times=1
    )
    acked = make_item_body(control_plane, item.id, state="starting", **changes)
    faults.add(literal(acked, applied=True), "ack", where=is_request_for_item(item.id))
    async with make_pool(return_at_once, block_ms=20, pollers=1):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "completed"
    assert recorder.of(PollFinished)[0].result == "item"
    (claimed,) = recorder.of(ItemReceived)
    unknown = changes.get("created_at", "now") in {None, "yesterday"}
    assert (claimed.pickup_seconds is None) is unknown


class PluginWithoutHandlers:
    """A plugin that has an event hook and no handler."""

    @hookimpl
    def workpool_event(self, event: object) -> None:
        """Ignore the event."""


@pytest.mark.parametrize("plugins", [[], [PluginWithoutHandlers()]], ids=["none", "no_handler"])
async def test_pool_without_handler_refuses_to_start(
    faults: Faults, make_settings: Any, plugins: list[object]
) -> None:
    with pytest.raises(PluginError, match="no plugin handles anything"):
        await Supervisor(make_settings(), plugins=plugins).__aenter__()
    assert not faults.seen


async def test_pool_without_environment_id_refuses_to_start(make_pool: Any) -> None:
    with pytest.raises(SettingsError, match="environment_id"):
        await make_pool(return_at_once, environment_id=None).__aenter__()


async def test_waiting_item_is_reported_as_lost_at_ack_if_another_worker_acknowledged_it(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    gate = SessionCountingHandler()
    first, second = control_plane.enqueue(2)
    async with make_pool(gate, concurrency=1, prefetch=1):
        await recorder.wait_for(SessionStarted)
        await recorder.wait_for(ItemReceived, count=2)
        operations, environment = control_plane.operations, control_plane.environments[0]
        assert operations.poll(environment, Poll("another", 0, 0)) is not None
        operations.ack_item(environment, second.id, "another")
        gate.opened.set()
        reclaimed = await recorder.wait_for(ItemReclaimed)
    assert (reclaimed.item.id, reclaimed.stage, reclaimed.direction) == (second.id, "ack", "lost")
    assert [request.op for request in faults.of(work_id=second.id)] == ["ack"]
    assert [event.session.item.id for event in recorder.of(SessionFinished)] == [first.id]


async def test_item_taken_by_another_worker_during_ack_is_lost_at_first_heartbeat(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    hold = Hold()
    faults.add(hold, "ack")
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once):
        await hold.reached()
        control_plane.operations.ack_item(control_plane.environments[0], item.id)
        control_plane.operations.heartbeat(control_plane.environments[0], item.id, "NO_HEARTBEAT")
        hold.release()
        reclaimed = await recorder.wait_for(ItemReclaimed)
    assert (reclaimed.stage, reclaimed.direction) == ("start", "lost")
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat"]
    assert not recorder.of(SessionStarted)
