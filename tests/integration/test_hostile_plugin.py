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

GOOD = 20
BLOCK_SECONDS = 1.5


class HostilePlugin:
    """A plugin that misbehaves as the metadata of the item say."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.freed = asyncio.Event()

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
        if session.item.metadata.get("mischief") == "wrap":
            raise RuntimeError("in the wrapping hook")

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        raise RuntimeError(f"in the observing hook, at {type(event).__name__}")

    async def wrap(self, _: Session) -> None:
        raise AssertionError("the context was not entered")

    async def never_return(self, _: Session) -> None:
        await asyncio.Event().wait()

    async def swallow_cancellation(self, _: Session) -> None:
        while not self.freed.is_set():
            try:
                await self.freed.wait()
            except asyncio.CancelledError:
                continue

    async def return_numbers(self, _: Session) -> Any:
        return {1: 2}

    async def exit_process(self, _: Session) -> None:
        raise SystemExit(3)

    async def block_loop(self, _: Session) -> None:
        time.sleep(BLOCK_SECONDS)  # noqa: ASYNC251 - what it must not do

    async def leave_thread(self, _: Session) -> None:
        threading.Thread(target=self.let_go.wait, daemon=True).start()


@handler
async def good_handler(session: Session) -> dict[str, str]:
    await session.update_metadata({"half": "done"})
    return {"done": "yes"}


@pytest.fixture
def hostile_settings() -> Iterator[HostilePlugin]:
    plugin = HostilePlugin()
    yield plugin
    plugin.let_go.set()


async def test_plugin_with_every_kind_of_fault_does_not_affect_other_plugins(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, hostile_settings: HostilePlugin
) -> None:
    mischiefs = [
        "choose", "not callable", "wrap", "never return", "swallow cancellation", "return numbers",
        "exit process", "block loop", "leave thread",
    ]  # fmt: skip
    for mischief in mischiefs:
        control_plane.enqueue(metadata={"mischief": mischief})
    control_plane.enqueue(GOOD)
    pool = make_pool(hostile_settings, good_handler, concurrency=6, pollers=2, block_ms=50)
    async with pool:
        # two of the sessions never end by themselves
        await recorder.wait_for(SessionFinished, count=GOOD + 5)
        await recorder.wait_for(ItemDeclined, count=2)
        started = asyncio.get_running_loop().time()
        await pool.drain(timeout=0.2)
        assert asyncio.get_running_loop().time() - started < 10
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert pool.abandoned == 1

    outcomes = {
        event.session.item.metadata.get("mischief"): event.outcome
        for event in recorder.of(SessionFinished)
    }
    assert outcomes == {
        None: "completed", "wrap": "failed", "never return": "released",
        "swallow cancellation": "released", "return numbers": "failed", "exit process": "failed",
        "block loop": "completed", "leave thread": "completed",
    }  # fmt: skip
    assert {event.reason for event in recorder.of(ItemDeclined)} == {"plugin_error"}
    hooks = Counter(event.hook for event in recorder.of(PluginFailed))
    assert hooks.keys() == {"workpool_session_handler", "workpool_event"}
    assert len(recorder.of(SessionStarted)) == GOOD + 7
    assert not recorder.of(PollerRestarted)
    assert pool.status().error is None
    hostile_settings.freed.set()
    await asyncio.sleep(0)
