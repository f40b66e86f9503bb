"""A plugin that breaks every rule for plugins does not affect the sessions of another plugin."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, WorkItem, handler, hookimpl
from workpool.events import (
    DrainFinished,
    ItemDeclined,
    PluginFailed,
    PollerRestarted,
    SessionFinished,
    SessionStarted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.events import Event
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

GOOD_ITEMS = 20
BLOCK_SECONDS = 1.5


class HostilePlugin:
    """A plugin that breaks a rule for plugins; the metadata of the item select the rule."""

    def __init__(self) -> None:
        self.threads_may_end = threading.Event()
        self.sessions_may_end = asyncio.Event()

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> Any:
        match item.metadata.get("mischief"):
            case None:
                return None
            case "choose":
                raise RuntimeError("in the choosing hook")
            case "not callable":
                return "handler"
            case mischief:
                return getattr(self, mischief.replace(" ", "_"))

    @hookimpl
    def workpool_wrap_session(self, session: Session) -> None:
        if session.item.metadata.get("mischief") == "raise in wrapping hook":
            raise RuntimeError("in the wrapping hook")

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        raise RuntimeError(f"in the observing hook, at {type(event).__name__}")

    async def raise_in_wrapping_hook(self, _: Session) -> None:
        raise AssertionError("the context was not entered")

    async def never_return(self, _: Session) -> None:
        await asyncio.Event().wait()

    async def swallow_cancellation(self, _: Session) -> None:
        while not self.sessions_may_end.is_set():
            try:
                await self.sessions_may_end.wait()
            except asyncio.CancelledError:
                continue

    async def return_int_keys(self, _: Session) -> Any:
        return {1: 2}

    async def exit_process(self, _: Session) -> None:
        raise SystemExit(3)

    async def block_loop(self, _: Session) -> None:
        time.sleep(BLOCK_SECONDS)  # noqa: ASYNC251 - what it must not do

    async def leave_thread_running(self, _: Session) -> None:
        threading.Thread(target=self.threads_may_end.wait, daemon=True).start()


@handler
async def well_behaved_handler(session: Session) -> dict[str, str]:
    await session.update_metadata({"half": "done"})
    return {"done": "yes"}


@pytest.fixture
def hostile_plugin() -> Iterator[HostilePlugin]:
    plugin = HostilePlugin()
    yield plugin
    plugin.threads_may_end.set()
    plugin.sessions_may_end.set()  # A running session would keep the event loop from closing.


async def test_plugin_with_every_kind_of_fault_does_not_affect_other_plugins(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, hostile_plugin: HostilePlugin,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("workpool.pool.handler_executor.REPEAT_SECONDS", 0.5)
    mischiefs = [
        "choose", "not callable", "raise in wrapping hook", "never return", "swallow cancellation",
        "return int keys", "exit process", "block loop", "leave thread running",
    ]  # fmt: skip
    for mischief in mischiefs:
        control_plane.enqueue(metadata={"mischief": mischief})
    control_plane.enqueue(GOOD_ITEMS)
    pool = make_pool(hostile_plugin, well_behaved_handler, concurrency=6, pollers=2, block_ms=50)
    async with pool:
        # The sessions of `never return` and `swallow cancellation` do not end before the drain.
        await recorder.wait_for(SessionFinished, count=GOOD_ITEMS + 5)
        await recorder.wait_for(ItemDeclined, count=2)
        async with asyncio.timeout(40):
            await pool.drain(timeout=0.2)
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert pool.abandoned == 1

    outcomes = {
        event.session.item.metadata.get("mischief"): event.outcome
        for event in recorder.of(SessionFinished)
    }
    assert outcomes == {
        None: "completed", "raise in wrapping hook": "failed", "never return": "released",
        "swallow cancellation": "released", "return int keys": "failed", "exit process": "failed",
        "block loop": "completed", "leave thread running": "completed",
    }  # fmt: skip
    assert {event.reason for event in recorder.of(ItemDeclined)} == {"plugin_error"}
    hooks = Counter(event.hook for event in recorder.of(PluginFailed))
    assert hooks.keys() == {"workpool_session_handler", "workpool_event"}
    assert len(recorder.of(SessionStarted)) == GOOD_ITEMS + 7
    assert not recorder.of(PollerRestarted)
    assert pool.status().error is None
