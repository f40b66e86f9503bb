"""Pauses by the embedder and refusals by plugins. See workpool/docs/semantics.md, "Pauses"."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.shared_handlers import GatedHandler, return_at_once
from workpool import hookimpl
from workpool.events import (
    ItemReceived,
    PluginFailed,
    PollFinished,
    SessionFinished,
    SessionStarted,
)
from workpool.plugins import registry
from workpool.pool import admission
from workpool.testing import Hold

if TYPE_CHECKING:
    from workpool import Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder

SECONDS = 20.0
"""Maximum time of each wait."""


class ClaimRefusingPlugin:
    """A plugin that refuses claims while `reason` is set, and counts the calls of its hook."""

    def __init__(self, reason: Any = None) -> None:
        self.reason = reason
        self.asked = 0
        self.changed = asyncio.Event()

    @hookimpl
    def workpool_admission(self, supervisor: Supervisor) -> str | None:
        assert supervisor.settings.pollers
        self.asked += 1
        self.changed.set()
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason  # type: ignore[no-any-return]  # a wrong type is tested too

    async def wait_for_hook_calls(self, count: int) -> None:
        """Wait until the hook was called `count` more times."""
        until = self.asked + count
        async with asyncio.timeout(SECONDS):
            while self.asked < until:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture(autouse=True)
def short_refusal_check_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "ASK_SECONDS", 0.02)


async def wait_until_no_poll_is_in_flight(supervisor: Supervisor) -> None:
    """Wait until every poller of a paused pool has ended its poll."""
    async with asyncio.timeout(SECONDS):
        paused = {"paused": supervisor.settings.pollers}
        while supervisor._take_pool_snapshot().pollers != paused:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0.01)


def read_item_state(plane: ControlPlane, item: Any) -> str:
    return plane.operations.get_item(plane.environments[0], item.id).state


async def test_paused_pool_claims_nothing_while_its_session_continues(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    gate = GatedHandler()
    async with make_pool(gate, block_ms=20, pollers=2) as supervisor:
        await recorder.wait_for(SessionStarted)
        supervisor.pause("maintenance\n of the \x1b[31mdatabase")
        await wait_until_no_poll_is_in_flight(supervisor)
        (reason,) = supervisor.status().reasons
        assert reason == "paused: maintenance\\n of the \\x1b[31mdatabase"
        polls = len(faults.of("poll"))
        (item,) = control_plane.enqueue()
        gate.may_end.set()
        await recorder.wait_for(SessionFinished)
        assert gate.interrupted == [False]
        assert len(faults.of("poll")) == polls
        assert read_item_state(control_plane, item) == "queued"
        supervisor.resume()
        await recorder.wait_for(SessionFinished, count=2)
        assert supervisor.status().ready
    assert {event.outcome for event in recorder.of(SessionFinished)} == {"completed"}


async def test_pool_is_paused_after_start_if_pause_was_called_before(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    supervisor = make_pool(return_at_once)
    supervisor.pause("not yet")
    async with supervisor:
        await wait_until_no_poll_is_in_flight(supervisor)
        assert not faults.of("poll")
        assert "paused: not yet" in supervisor.status().reasons
        supervisor.resume()
        supervisor.resume()
        await recorder.wait_for(SessionFinished)


async def test_pause_with_end_time_ends_at_that_time(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    supervisor = make_pool(return_at_once)
    supervisor.pause("no end")
    supervisor.pause("one hour", until=datetime.now(UTC) + timedelta(hours=1))
    async with supervisor:
        assert "paused: one hour" in supervisor.status().reasons
        supervisor.pause("short", until=datetime.now(UTC) + timedelta(seconds=0.2))
        await recorder.wait_for(SessionFinished)
        assert supervisor.status().ready


async def test_pause_with_past_end_time_does_not_affect_status_of_full_pool(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    gate = GatedHandler()
    async with make_pool(gate, concurrency=1) as supervisor:
        await recorder.wait_for(SessionStarted)
        supervisor.pause("past", until=datetime.now(UTC) - timedelta(seconds=1))
        assert supervisor.status().ready
        gate.may_end.set()


async def test_pause_with_past_end_time_has_no_effect(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    supervisor = make_pool(return_at_once)
    supervisor.pause("past", until=datetime.now(UTC) - timedelta(days=1))
    async with supervisor:
        await recorder.wait_for(SessionFinished)


async def test_pause_with_end_time_without_time_zone_raises(make_pool: Any) -> None:
    supervisor = make_pool(return_at_once)
    with pytest.raises(ValueError, match="needs a time zone"):
        supervisor.pause("x", until=datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake
    assert supervisor._admission.pause_reason is None


async def test_items_that_wait_for_slot_stay_queued_when_pool_is_paused(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    _, *waiting = control_plane.enqueue(3)
    gate = GatedHandler()
    async with make_pool(gate, concurrency=1, prefetch=2) as supervisor:
        await recorder.wait_for(ItemReceived, count=3)
        await recorder.wait_for(SessionStarted)
        supervisor.pause("now")
        assert supervisor.status().waiting == 0
        gate.may_end.set()
        await recorder.wait_for(SessionFinished)
        assert gate.interrupted == [False]
        assert [read_item_state(control_plane, item) for item in waiting] == ["queued", "queued"]


async def test_item_delivered_during_pause_is_not_claimed(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    hold = Hold(applied=True)
    faults.add(hold, "poll", times=1)
    (item,) = control_plane.enqueue()
    async with make_pool(return_at_once, block_ms=20) as supervisor:
        await hold.reached()
        supervisor.pause("now")
        hold.release()
        await recorder.wait_for(PollFinished)
        await wait_until_no_poll_is_in_flight(supervisor)
        assert read_item_state(control_plane, item) == "queued"
        assert not recorder.of(ItemReceived)


async def test_paused_pool_drains_at_once(control_plane: ControlPlane, make_pool: Any) -> None:
    control_plane.enqueue()
    supervisor = make_pool(return_at_once)
    supervisor.pause("now")
    async with supervisor, asyncio.timeout(SECONDS):
        await wait_until_no_poll_is_in_flight(supervisor)
        await supervisor.drain(timeout=None)


async def test_paused_time_does_not_count_as_idle_time(make_pool: Any) -> None:
    supervisor = make_pool(return_at_once, block_ms=10, exit_after_idle=0.5)
    supervisor.pause("now")
    async with supervisor:
        await wait_until_no_poll_is_in_flight(supervisor)
        # Stay paused for longer than `exit_after_idle`. If this time counted as idle, the pool
        # would end as soon as it is resumed.
        await asyncio.sleep(0.6)
        resumed = time.monotonic()
        supervisor.resume()
        async with asyncio.timeout(SECONDS):
            await supervisor.wait()
    assert time.monotonic() - resumed > 0.4


async def test_refusing_plugin_is_asked_again_before_each_poll(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    disk, gate = ClaimRefusingPlugin(), GatedHandler()
    async with make_pool(gate, disk, block_ms=20) as supervisor:
        await recorder.wait_for(SessionStarted)
        disk.reason = "disk full"
        await disk.wait_for_hook_calls(2)
        await wait_until_no_poll_is_in_flight(supervisor)
        assert supervisor.status().reasons == ("refused: ClaimRefusingPlugin: disk full",)
        assert supervisor._take_pool_snapshot().paused == {"pause": 0, "plugin": 1, "limit": 0}
        polls = len(faults.of("poll"))
        control_plane.enqueue()
        await disk.wait_for_hook_calls(5)
        assert len(faults.of("poll")) == polls
        gate.may_end.set()
        await recorder.wait_for(SessionFinished)
        assert gate.interrupted == [False]
        disk.reason = None
        await recorder.wait_for(SessionFinished, count=2)
        assert supervisor.status().ready


async def test_repeated_error_of_admission_hook_is_logged_once_per_minute(
    make_pool: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_logged_errors() -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        return [text.partition("RuntimeError")[2] for text in texts if "plugin failed" in text]

    disk = ClaimRefusingPlugin(RuntimeError("one"))
    async with make_pool(return_at_once, disk, pollers=2):
        await disk.wait_for_hook_calls(10)
        assert list_logged_errors() == [": one"]
        disk.reason = RuntimeError("two")
        await disk.wait_for_hook_calls(5)
        # The second error is not logged, because it came within a minute after the first one.
        assert list_logged_errors() == [": one"]
        monkeypatch.setattr(registry, "REFUSAL_LOG_SECONDS", 0.0)
        await disk.wait_for_hook_calls(5)
        assert list_logged_errors() == [": one", ": two"]
        disk.reason = None
        await disk.wait_for_hook_calls(1)
        disk.reason = RuntimeError("two")
        await disk.wait_for_hook_calls(5)
        assert list_logged_errors() == [": one", ": two", ": two"]


@pytest.mark.parametrize("wrong", [RuntimeError("no such device"), 7])
async def test_plugin_whose_admission_hook_fails_counts_as_refusing(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder, wrong: Any
) -> None:
    control_plane.enqueue()
    disk = ClaimRefusingPlugin(wrong)
    async with make_pool(return_at_once, disk) as supervisor:
        await disk.wait_for_hook_calls(3)
        assert not faults.of("poll")
        assert (
            "refused: ClaimRefusingPlugin: workpool_admission failed" in supervisor.status().reasons
        )
        disk.reason = None
        await recorder.wait_for(SessionFinished)
    assert {event.hook for event in recorder.of(PluginFailed)} == {"workpool_admission"}
