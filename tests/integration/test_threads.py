"""Threads and contexts of a pool, and the order in which its parts close.

See workpool/docs/architecture.md, "Threads and loops".
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.condition_polling import wait_until
from workpool import Session, Supervisor, WorkClient, handler, hookimpl
from workpool.events import HeartbeatFinished, LoopLagMeasured, RequestFinished, SessionFinished

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

seen: ContextVar[str] = ContextVar("seen", default="nothing")


@handler
async def return_at_once(_: Session) -> None:
    return None


async def test_observers_receive_events_of_all_threads_on_thread_of_handlers(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    threads: dict[type, set[str]] = {}

    class ThreadRecorder:
        @hookimpl
        def workpool_event(self, event: object) -> None:
            threads.setdefault(type(event), set()).add(threading.current_thread().name)

    control_plane.enqueue()
    async with make_pool(return_at_once, ThreadRecorder()):
        await recorder.wait_for(SessionFinished)
        await recorder.wait_for(LoopLagMeasured)
    here = threading.current_thread().name
    assert {HeartbeatFinished, RequestFinished, LoopLagMeasured} <= threads.keys()
    assert set().union(*threads.values()) == {here}


async def test_context_variable_set_by_handler_is_unset_in_next_session(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    before: list[str] = []

    @handler
    async def set_context_variable(session: Session) -> None:
        before.append(seen.get())
        seen.set(session.id)

    control_plane.enqueue(5)
    token = seen.set("the embedder's")
    async with make_pool(set_context_variable, concurrency=1):
        await recorder.wait_for(SessionFinished, count=5)
    assert before == ["the embedder's"] * 5
    seen.reset(token)


async def test_renewer_closes_before_plugins_and_plugins_before_connections(
    control_plane: ControlPlane, make_settings: Any, recorder: Recorder
) -> None:
    clients: list[WorkClient] = []
    closing: dict[str, Any] = {}

    def connect_and_record_client(settings: Settings) -> WorkClient:
        clients.append(WorkClient(settings))
        return clients[-1]

    class LifespanCloseRecordingPlugin:
        @hookimpl
        def workpool_lifespan(self) -> Any:
            return self.record_lifespan_close()

        @asynccontextmanager
        async def record_lifespan_close(self) -> AsyncIterator[None]:
            yield
            closing["threads"] = [
                thread.name
                for thread in threading.enumerate()
                if thread.name.startswith("workpool-lease")
            ]
            closing["stats"] = await clients[0].stats()

    control_plane.enqueue()
    plugins = [return_at_once, LifespanCloseRecordingPlugin(), recorder]
    async with Supervisor(make_settings(), plugins=plugins, connect=connect_and_record_client):
        await recorder.wait_for(SessionFinished)
    assert closing["threads"] == []
    assert closing["stats"].depth == 0
    assert len(clients) == 2
    for client in clients:
        with pytest.raises(RuntimeError, match="not open"):
            await client.stats()


async def test_dispatcher_remembers_no_more_item_ids_than_its_limit(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool.pool.dispatcher.REMEMBERED_IDS", 3)
    control_plane.enqueue(8)
    async with make_pool(return_at_once) as pool:
        await recorder.wait_for(SessionFinished, count=8)
        dispatcher = pool._view.dispatcher
        await wait_until(lambda: not len(dispatcher.items))
        assert len(dispatcher._seen) == 3
