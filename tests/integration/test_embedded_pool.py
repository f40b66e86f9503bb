"""Pools embedded in another application change no global state and leave no task or thread.

See workpool/docs/embedding.md, "Embedding".
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import re
import signal
import socket
import threading
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from tests.integration.condition_polling import wait_until
from workpool import PluginError, Session, Supervisor, handler, hookimpl
from workpool.errors import ListenError
from workpool.events import PoolFailed, SessionFinished, SessionStarted, StopFinished
from workpool.testing import Hold, Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.server import ControlPlane
    from workpool.testing import Faults

OPEN_FILES = Path("/proc/self/fd")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@handler
async def wait_if_metadata_requests_wait(session: Session) -> dict[str, str]:
    if "wait" in session.item.metadata:
        await session.interrupted()
    return {"done": "yes"}


def global_process_state() -> dict[str, Any]:
    """Return the global state of the process, which a pool must not change.

    Signal handlers, hooks and loggers belong to it.
    """
    root = logging.getLogger()
    ours = logging.getLogger("workpool")
    return {
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "policy": asyncio.get_event_loop_policy(),
        "handlers": [*root.handlers],
        "our handlers": [*ours.handlers],
        "levels": (root.level, ours.level),
        "exception handler": asyncio.get_running_loop().get_exception_handler(),
    }


def open_file_count() -> int:
    return len(list(OPEN_FILES.iterdir())) if OPEN_FILES.exists() else 0


async def test_running_pool_changes_no_global_state(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    before = global_process_state()
    control_plane.enqueue()
    async with make_pool(wait_if_metadata_requests_wait, metrics_listen="127.0.0.1:0"):
        await recorder.wait_for(SessionFinished)
        assert global_process_state() == before
    assert global_process_state() == before


async def end_pool_at_moment(
    moment: int, supervisor: Supervisor, recorder: Recorder, plane: Any
) -> None:
    """Run a pool and end its `async with` block, normally or with an error, at a given moment."""
    async with supervisor:
        if moment >= 1:
            plane.enqueue(metadata={} if moment % 2 else {"wait": "yes"})
        if moment >= 2:
            await recorder.wait_for(SessionStarted)
        if moment >= 4 and moment % 2:
            await recorder.wait_for(StopFinished)
        if moment in {3, 5}:
            raise LookupError
        if moment >= 6:
            await asyncio.sleep(60)


async def test_end_of_pool_at_any_point_leaves_no_task_or_thread(
    control_plane: ControlPlane, make_settings: Any
) -> None:
    dice = random.Random(7)  # noqa: S311 - repeatable, guards nothing
    seen: list[int] = []

    async def run_and_end_pool(moment: int) -> None:
        recorder = Recorder()
        settings = make_settings(
            metrics_listen="127.0.0.1:0", drain_timeout=dice.choice([0, 5]), stats_interval=0.01
        )
        supervisor = Supervisor(settings, plugins=[wait_if_metadata_requests_wait, recorder])
        async with asyncio.TaskGroup() as group:
            task = group.create_task(
                await_and_ignore_lookup_error(
                    end_pool_at_moment(moment, supervisor, recorder, control_plane)
                )
            )
            if moment >= 6:
                await recorder.wait_for(SessionStarted)
                task.cancel()
            elif moment == 0 and dice.random() < 0.5:
                for _ in range(dice.randrange(30)):
                    await asyncio.sleep(0)
                task.cancel()

    await run_and_end_pool(2)
    await wait_until(lambda: threading.active_count() == 1 or not workpool_threads())
    gc.collect()
    before, tasks, world = open_file_count(), asyncio.all_tasks(), global_process_state()
    for _ in range(50):
        seen.append(dice.randrange(8))
        await run_and_end_pool(seen[-1])
        assert not workpool_threads()
    assert len(set(seen)) == 8
    assert global_process_state() == world
    await wait_until(lambda: asyncio.all_tasks() <= tasks)
    await wait_until(lambda: open_file_count() <= before)


def workpool_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "workpool" in thread.name]


async def await_and_ignore_lookup_error(waiting: Any) -> None:
    with suppress(LookupError):
        await waiting


async def test_several_pools_share_one_loop_and_registry(
    control_plane: ControlPlane, faults: Faults, make_settings: Any
) -> None:
    registry = CollectorRegistry()
    recorders = [Recorder(), Recorder(), Recorder()]
    pools = [
        Supervisor(
            make_settings(concurrency=1),
            plugins=[wait_if_metadata_requests_wait, recorder],
            registry=registry,
        )
        for recorder in recorders
    ]
    control_plane.enqueue(3, {"wait": "yes"})
    async with pools[0], pools[1], pools[2]:
        for recorder in recorders:
            await recorder.wait_for(SessionStarted)
        text = generate_latest(registry).decode()
        (limit,) = re.findall(r"^workpool_slots_limit{.*} (.*)$", text, re.MULTILINE)
        (active,) = re.findall(
            r'^workpool_sessions_active{.*wait_if_metadata_requests_wait"} (.*)$',
            text,
            re.MULTILINE,
        )
        assert (float(limit), float(active)) == (3, 3)
        workers = {request.worker_id for request in faults.of("ack")}
        assert len(workers) == 3
    assert control_plane.summary() == (3, 3, 0, 0, 0)


async def test_each_start_uses_a_new_worker_id(faults: Faults, make_pool: Any) -> None:
    for _ in range(3):
        polls = len(faults.of("poll"))
        async with make_pool(wait_if_metadata_requests_wait, worker_id="me"):
            await faults.wait_for("poll", count=polls + 1)
    names = {request.worker_id for request in faults.seen}
    assert len(names) == 3
    assert all(re.fullmatch("me-[0-9a-f]{8}", str(name)) for name in names)


async def test_all_requests_of_pool_have_one_worker_id(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue()
    async with make_pool(wait_if_metadata_requests_wait):
        await recorder.wait_for(SessionFinished)
    assert {request.op for request in faults.seen} == {"poll", "ack", "heartbeat", "update", "stop"}
    assert len({request.worker_id for request in faults.seen}) == 1


async def test_metrics_registry_of_caller_is_used_and_can_be_reused_afterwards(
    control_plane: ControlPlane, make_settings: Any, recorder: Recorder
) -> None:
    registry = CollectorRegistry()
    Counter("mine", "The caller's own.", registry=registry)
    supervisor = Supervisor(
        make_settings(), plugins=[wait_if_metadata_requests_wait, recorder], registry=registry
    )
    assert supervisor.registry is registry
    control_plane.enqueue()
    async with supervisor:
        await recorder.wait_for(SessionFinished)
    text = generate_latest(registry).decode()
    assert "mine_total" in text
    assert re.search(r'^workpool_sessions_total{.*outcome="completed"} 1.0$', text, re.MULTILINE)
    async with Supervisor(
        make_settings(), plugins=[wait_if_metadata_requests_wait], registry=registry
    ):
        pass


async def test_second_start_of_same_pool_raises(make_pool: Any) -> None:
    supervisor = make_pool(wait_if_metadata_requests_wait)
    async with supervisor:
        with pytest.raises(RuntimeError, match="runs once"):
            await supervisor.__aenter__()
        assert supervisor.status().ready or "no successful poll" in supervisor.status().reasons[0]
    with pytest.raises(RuntimeError, match="runs once"):
        await supervisor.run()


async def test_pool_that_has_not_started_says_so_in_status_and_errors(make_pool: Any) -> None:
    supervisor = make_pool(wait_if_metadata_requests_wait)
    for call in (supervisor.wait, supervisor.drain):
        with pytest.raises(RuntimeError, match="not started"):
            await call()
    status = supervisor.status()
    assert (status.ready, status.reasons, status.capacity) == (False, ("not started",), 4)


async def test_start_error_names_port_that_is_in_use(make_pool: Any, faults: Faults) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match="metrics_listen") as caught:
            await make_pool(wait_if_metadata_requests_wait, metrics_listen=address).__aenter__()
        assert address in str(caught.value)
    assert not faults.seen
    assert not workpool_threads()


async def test_second_pool_on_same_port_fails_and_first_continues(make_pool: Any) -> None:
    async with make_pool(wait_if_metadata_requests_wait, metrics_listen="127.0.0.1:0") as first:
        address = first.metrics_url.removeprefix("http://")
        with pytest.raises(ListenError):
            await make_pool(wait_if_metadata_requests_wait, metrics_listen=address).__aenter__()
        async with aiohttp.ClientSession() as http, http.get(f"{first.metrics_url}/healthz") as ok:
            assert ok.status == 200


class DatabasePlugin:
    """A plugin that records when its lifespan opens and closes, and can fail at either moment."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.trace: list[str] = []
        self.closed = False

    @hookimpl
    def workpool_lifespan(self, supervisor: Supervisor) -> Any:
        Counter("plugins_own", "The plugin's own.", registry=supervisor.registry)
        return self.database_connection()

    @hookimpl
    def workpool_event(self, event: object) -> None:
        self.trace.append(type(event).__name__)

    @asynccontextmanager
    async def database_connection(self) -> AsyncIterator[None]:
        self.trace.append("opening")
        if self.fails == "opening":
            raise LookupError("no database")
        try:
            yield
        finally:
            self.closed = True
            self.trace.append("closing")
        if self.fails == "closing":
            raise LookupError("lost the database")


async def test_lifespan_of_plugin_encloses_all_sessions_and_drain(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    plugin = DatabasePlugin()
    control_plane.enqueue(metadata={"wait": "yes"})
    async with make_pool(wait_if_metadata_requests_wait, plugin) as supervisor:
        await recorder.wait_for(SessionStarted)
    facts = [fact for fact in plugin.trace if fact != "RequestFinished"]
    assert facts[0] == "opening"
    assert facts.index("SessionFinished") < facts.index("closing")
    assert facts.index("DrainFinished") < facts.index("closing")
    assert "plugins_own_total" in generate_latest(supervisor.registry).decode()


async def test_lifespan_that_fails_to_open_prevents_start(faults: Faults, make_pool: Any) -> None:
    first = DatabasePlugin()
    with pytest.raises(LookupError, match="no database") as caught:
        await make_pool(
            make_plugin_with_same_connection(first),
            wait_if_metadata_requests_wait,
            DatabasePlugin("opening"),
        ).__aenter__()
    assert any("'DatabasePlugin'" in note for note in caught.value.__notes__)
    assert first.closed
    assert not faults.seen
    assert not workpool_threads()


def make_plugin_with_same_connection(plugin: DatabasePlugin) -> object:
    """Return a plugin of another class whose lifespan is the database connection of `plugin`."""

    class ConnectionSharingPlugin:
        @hookimpl
        def workpool_lifespan(self) -> Any:
            return plugin.database_connection()

    return ConnectionSharingPlugin()


async def test_lifespan_that_fails_to_close_raises_after_drain(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    control_plane.enqueue(metadata={"wait": "yes"})
    supervisor = make_pool(wait_if_metadata_requests_wait, DatabasePlugin("closing"))
    await supervisor.__aenter__()
    await recorder.wait_for(SessionStarted)
    with pytest.raises(LookupError, match="lost the database"):
        await supervisor.__aexit__(None, None, None)
    assert recorder.of(SessionFinished)[0].outcome == "completed"
    assert [str(event.error) for event in recorder.of(PoolFailed)] == ["lost the database"]
    assert recorder.events[-1] is recorder.of(PoolFailed)[0]


async def test_unknown_plugin_prevents_start_with_error_that_names_it(
    faults: Faults, make_pool: Any
) -> None:
    with pytest.raises(PluginError, match="no_such_plugin"):
        await make_pool(wait_if_metadata_requests_wait, "no_such_plugin:Anywhere").__aenter__()
    assert not faults.seen


async def test_failing_observers_do_not_affect_sessions(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    class FailingObserver:
        @hookimpl
        def workpool_event(self, event: object) -> None:
            raise LookupError(event)

    control_plane.enqueue(5)
    async with make_pool(FailingObserver(), wait_if_metadata_requests_wait):
        await recorder.wait_for(SessionFinished, count=5)
    assert {event.outcome for event in recorder.of(SessionFinished)} == {"completed"}


async def test_health_endpoint_answers_during_drain_and_closes_with_pool(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, reserved_port: int
) -> None:
    hold = Hold()
    faults.add(hold, "stop")
    control_plane.enqueue()
    pool = make_pool(wait_if_metadata_requests_wait, metrics_listen=f"127.0.0.1:{reserved_port}")
    async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as group:
        running = group.create_task(pool.run())
        await hold.reached()
        url = pool.metrics_url
        group.create_task(pool.drain())
        async with http.get(f"{url}/readyz") as ready:
            assert ready.status == 503
            assert (await ready.json())["reasons"] == ["draining"]
        hold.release()
        await running
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.get(f"{url}/healthz")
