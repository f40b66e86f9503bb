"""Plain `def` handlers run on threads of the pool and use a blocking session."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest

from workpool import (
    BlockingSession,
    LeaseLost,
    Release,
    Retry,
    Session,
    SessionEnded,
    Supervisor,
    handler,
    hookimpl,
)
from workpool.events import HandlerRetried, SessionFinished, SessionStarted
from workpool.handlers import Handler
from workpool.pool import handler_executor
from workpool.testing import Kit
from workpool.testing.virtual_time import run_on_virtual_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from workpool import JSON
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

seen: ContextVar[str] = ContextVar("seen", default="nothing")
WAIT_SECONDS = 20.0


class ThreadGate:
    """Blocks the thread of a handler until the test opens the gate."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def block_until_gate_opens(self) -> None:
        self.reached.set()
        assert self.opened.wait(WAIT_SECONDS)

    async def wait_until_thread_is_blocked(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, WAIT_SECONDS)


@pytest.fixture
def thread_gate() -> Iterator[ThreadGate]:
    """Return a gate, and open it after the test so that no thread stays blocked."""
    gate = ThreadGate()
    yield gate
    gate.opened.set()


def handler_thread_names() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("workpool-handler")}


async def test_plain_handler_runs_on_a_thread_and_its_result_is_written(run_one_item: Any) -> None:
    threads: list[str] = []

    def write_metadata_and_return_json(session: BlockingSession) -> JSON:
        threads.append(threading.current_thread().name)
        item = session.update_metadata({"phase": "counting"})
        return {"rows": len(item.metadata), "attempt": session.attempt}

    final = await run_one_item(write_metadata_and_return_json)
    assert final.outcome == "completed"
    assert final.metadata == {"phase": "counting", "workpool.result": '{"rows":1,"attempt":1}'}
    assert threads == ["workpool-handler-1"]
    assert handler_thread_names() == set()


async def test_exception_of_plain_handler_determines_session_outcome(
    run_one_item: Any,
) -> None:
    def raise_error(_: BlockingSession) -> None:
        raise StopIteration("which no future can hold")

    def raise_release(_: BlockingSession) -> None:
        raise Release("later", 60)

    def raise_system_exit(_: BlockingSession) -> None:
        raise SystemExit(3)

    def raise_keyboard_interrupt(_: BlockingSession) -> None:
        raise KeyboardInterrupt

    final = await run_one_item(raise_error)
    assert (final.outcome, type(final.finished.error)) == ("failed", RuntimeError)
    assert "StopIteration" in str(final.finished.error)
    assert (await run_one_item(raise_system_exit)).metadata == {"workpool.error": "SystemExit"}
    assert (await run_one_item(raise_keyboard_interrupt)).metadata == {
        "workpool.error": "RuntimeError"
    }
    assert (await run_one_item(raise_release)).outcome == "released"


async def test_plain_handler_that_returns_coroutine_fails_session(run_one_item: Any) -> None:
    async def coroutine_function(_: Any) -> None: ...

    def return_coroutine(session: BlockingSession) -> Any:
        return coroutine_function(session)

    final = await run_one_item(return_coroutine)
    assert final.outcome == "failed"
    assert "returned a coroutine" in str(final.finished.error)


async def test_pool_starts_threads_on_demand_and_at_most_one_per_slot(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    together = threading.Barrier(3)
    threads: set[str] = set()

    @handler
    def wait_for_three_sessions(_: BlockingSession) -> None:
        threads.add(threading.current_thread().name)
        together.wait(WAIT_SECONDS)

    async with make_pool(wait_for_three_sessions, concurrency=3):
        assert handler_thread_names() == set()
        control_plane.enqueue(9)
        await recorder.wait_for(SessionFinished, count=9, timeout=WAIT_SECONDS)
        assert threads == handler_thread_names() == {f"workpool-handler-{n}" for n in (1, 2, 3)}
    assert handler_thread_names() == set()


async def test_loop_and_other_sessions_continue_while_a_plain_handler_blocks(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, thread_gate: ThreadGate
) -> None:
    @handler(metadata={"kind": "plain"})
    def blocking_handler(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    @handler
    async def other_handler(_: Session) -> None: ...

    control_plane.enqueue(metadata={"kind": "plain"})
    async with make_pool(blocking_handler, other_handler):
        await thread_gate.wait_until_thread_is_blocked()
        control_plane.enqueue(5)
        await recorder.wait_for(SessionFinished, count=5)
        thread_gate.opened.set()
        await recorder.wait_for(SessionFinished, count=6)


async def test_plain_handler_sees_context_variables_and_state_of_plugins(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    found: list[Any] = []

    class ContextVariablePlugin:
        @hookimpl
        def workpool_wrap_session(self, session: Session) -> Any:
            @asynccontextmanager
            async def session_context() -> AsyncIterator[None]:
                session.state["database"] = "open"
                yield

            return session_context()

    @handler
    def record_context_variable_and_state(session: BlockingSession) -> None:
        found.append((seen.get(), session.state["database"]))

    seen.set("the embedder's")
    control_plane.enqueue()
    async with make_pool(record_context_variable_and_state, ContextVariablePlugin()):
        await recorder.wait_for(SessionFinished)
    assert found == [("the embedder's", "open")]


def test_blocking_session_class_has_all_names_that_session_class_offers_to_handlers() -> None:
    """`BlockingSession` lacks only `outcome` and the two names of `Session` that the pool uses."""
    of_the_pool = {"interrupt", "trace_fields", "outcome"}
    names = {name for name in dir(Session) if not name.startswith("_")} - of_the_pool
    assert names <= set(dir(BlockingSession))


async def test_lost_lease_cancels_plain_handler_and_later_calls_raise(workpool: Kit) -> None:
    errors: list[BaseException] = []

    @handler
    def write_metadata_after_cancellation(session: BlockingSession) -> None:
        if session.redelivered:
            return
        assert session.cancelled.wait(WAIT_SECONDS)
        try:
            session.update_metadata({"late": "yes"})
        except LeaseLost as error:
            errors.append(error)
            raise

    [item] = workpool.enqueue()
    async with workpool.pool(write_metadata_after_cancellation):
        await workpool.wait_for(SessionStarted)
        workpool.lose(item)
        lost = await workpool.wait_for(SessionFinished)
        again = await workpool.wait_for(SessionFinished)
    assert (lost.outcome, again.outcome) == ("lease_lost", "completed")
    assert len(errors) == 1
    assert "late" not in workpool.item(item).metadata


async def test_plain_handler_of_lost_session_keeps_slot_and_item_until_thread_ends(
    workpool: Kit, thread_gate: ThreadGate
) -> None:
    runs: list[bool] = []

    @handler
    def wait_in_first_session(session: BlockingSession) -> None:
        runs.append(session.redelivered)
        if not session.redelivered:
            thread_gate.block_until_gate_opens()

    [item] = workpool.enqueue()
    async with workpool.pool(wait_in_first_session, concurrency=2, reclaim_older_than_ms=0) as pool:
        await thread_gate.wait_until_thread_is_blocked()
        workpool.lose(item)
        await workpool.faults.wait_for("poll", count=len(workpool.faults.of("poll")) + 5)
        assert (pool.status().running, runs) == (1, [False])
        thread_gate.opened.set()
        await workpool.wait_for(SessionFinished, lambda event: event.outcome == "completed")
    assert runs == [False, True]


async def test_blocking_call_in_progress_ends_when_session_times_out(workpool: Kit) -> None:
    errors: list[BaseException] = []

    @handler(timeout=0.5)
    def read_event_stream(session: BlockingSession) -> None:
        try:
            with session.events.stream() as stream:
                for _ in stream:
                    pass
        except SessionEnded as error:
            errors.append(error)
            raise

    result = await workpool.run_session(read_event_stream)
    assert (result.outcome, len(errors)) == ("timed_out", 1)
    assert result.metadata == {"workpool.error": "TimeoutError"}


async def test_result_of_plain_handler_after_stop_request_is_written(workpool: Kit) -> None:
    @handler
    def return_after_interruption(session: BlockingSession) -> dict[str, str]:
        steps = 0
        while not session.interrupted(0.01):
            steps += 1
        return {"heard": "stopping" if session.stopping else "draining"}

    [item] = workpool.enqueue()
    async with workpool.pool(return_after_interruption):
        await workpool.wait_for(SessionStarted)
        workpool.stop(item)
        finished = await workpool.wait_for(SessionFinished)
    assert (finished.outcome, workpool.item(item).metadata) == ("stopped", {"heard": "stopping"})


async def test_drain_interrupts_plain_handler_and_waits_for_its_result(workpool: Kit) -> None:
    @handler
    def return_after_interruption(session: BlockingSession) -> dict[str, str]:
        assert session.interrupted(WAIT_SECONDS)
        return {"heard": "draining" if session.draining else "nothing"}

    [item] = workpool.enqueue()
    async with workpool.pool(return_after_interruption) as pool:
        await workpool.wait_for(SessionStarted)
        await pool.drain()
    assert pool.abandoned == 0
    assert workpool.item(item).metadata == {"heard": "draining"}


async def test_drain_abandons_plain_handler_that_hangs(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, thread_gate: ThreadGate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 1.0)
    errors: list[BaseException] = []

    @handler
    def block_and_write_metadata(session: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()
        try:
            session.update_metadata({"late": "yes"})
        except SessionEnded as error:
            errors.append(error)

    (item,) = control_plane.enqueue()
    began = time.monotonic()
    async with make_pool(block_and_write_metadata, drain_timeout=0) as pool:
        await thread_gate.wait_until_thread_is_blocked()
    assert time.monotonic() - began < 40
    assert pool.abandoned == 1
    assert recorder.of(SessionFinished)[0].outcome == "released"
    [thread] = [each for each in threading.enumerate() if each.name == "workpool-handler-1"]
    thread_gate.opened.set()
    await asyncio.to_thread(thread.join, WAIT_SECONDS)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert (
        "late"
        not in control_plane.operations.get_item(control_plane.environments[0], item.id).metadata
    )


async def test_plain_handler_that_ignores_cancellation_is_logged_with_its_stack(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, thread_gate: ThreadGate,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(handler_executor, "REPEAT_SECONDS", 0.2)

    @handler(timeout=0.1)
    def ignore_cancellation(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    control_plane.enqueue()
    with caplog.at_level(logging.INFO, "workpool"):
        async with make_pool(ignore_cancellation) as pool:
            stuck = asyncio.Event()
            pool._view.dispatcher.executor.on_stuck = stuck.set
            async with asyncio.timeout(20):
                await stuck.wait()
            thread_gate.opened.set()
            finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "timed_out"
    [report] = [each for each in caplog.records if "ignores its cancellation" in each.message]
    assert "thread_gate.block_until_gate_opens()" in str(report.stack_info)


async def test_blocking_session_can_be_used_from_many_threads_at_once(run_one_item: Any) -> None:
    def write_metadata_from_threads(session: BlockingSession) -> None:
        threads = [
            threading.Thread(target=session.update_metadata, args=({f"key{n}": "x"},))
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    final = await run_one_item(write_metadata_from_threads)
    assert (final.outcome, len(final.metadata)) == ("completed", 20)


async def test_method_of_blocking_session_raises_session_ended_after_handler_returned(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    kept: list[BlockingSession] = []

    @handler
    def store_session(session: BlockingSession) -> None:
        kept.append(session)

    control_plane.enqueue()
    async with make_pool(store_session):
        await recorder.wait_for(SessionFinished)
        with pytest.raises(SessionEnded):
            await asyncio.to_thread(kept[0].update_metadata, {"late": "yes"})
        with pytest.raises(RuntimeError, match="cannot be used on the event loop"):
            kept[0].update_metadata({"late": "yes"})


async def test_plain_handler_answers_tool_uses_of_an_agent(workpool: Kit) -> None:
    @handler
    def send_result_of_each_tool_use(session: BlockingSession) -> dict[str, str]:
        before = len(list(session.events.list()))
        done = 0
        with session.events.stream() as stream:
            for event in stream:
                if event["type"] == "agent.tool_use":
                    result = {"tool_use_id": event["id"], "content": [], "is_error": False}
                    session.events.send({"type": "user.tool_result", **result})
                    done += 1
                if event.get("stop_reason", {}).get("type") == "end_turn":
                    break
        return {"done": str(done), "before": "some" if before else "none"}

    script = [{"name": "bash", "input": {"command": "ls"}}] * 3
    result = await workpool.run_session(send_result_of_each_tool_use, script=script)
    assert (result.outcome, dict(result.metadata)) == ("completed", {"done": "3", "before": "some"})


async def test_plain_handler_can_complete_session_after_error_in_handoff_block(
    workpool: Kit,
) -> None:
    @handler
    def raise_error_in_handoff_block(session: BlockingSession) -> dict[str, str]:
        with pytest.raises(ValueError, match="no child"), session.handover() as lease:
            raise ValueError(f"no child for {lease.work_id}")
        return {"took": "back"}

    result = await workpool.run_session(raise_error_in_handoff_block)
    assert (result.outcome, dict(result.metadata)) == ("completed", {"took": "back"})


async def test_plain_handler_hands_its_item_off_to_a_child(workpool: Kit) -> None:
    loop = asyncio.get_running_loop()
    operations = workpool.server.operations

    @handler
    def hand_off_item(session: BlockingSession) -> None:
        with session.handover() as lease:
            first_heartbeat = (lease.environment_id, lease.work_id, lease.last_heartbeat, lease.ttl)
            loop.call_soon_threadsafe(operations.heartbeat, *first_heartbeat, "child")

    result = await workpool.run_session(hand_off_item)
    assert (result.outcome, result.item.state) == ("detached", "active")


async def test_time_in_waiting_block_does_not_count_towards_stall_timeout_of_plain_handler(
    workpool: Kit,
) -> None:
    waited: list[bool] = []

    @handler(stall_timeout=2.0)
    def stop_reporting_progress(session: BlockingSession) -> None:
        with session.waiting():
            waited.append(session.cancelled.wait(3.0))
        session.progress()
        waited.append(session.cancelled.wait(WAIT_SECONDS))

    result = await workpool.run_session(stop_reporting_progress)
    assert (result.outcome, waited) == ("stalled", [False, True])


def test_plain_handler_that_blocks_in_virtual_time_causes_error_with_its_name(
    thread_gate: ThreadGate,
) -> None:
    @handler
    def resize_image(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    async def run_in_virtual_time() -> None:
        async with Kit() as kit:
            await kit.run_session(resize_image)

    with pytest.raises(RuntimeError, match=r"cannot wait for the thread of \S*resize"):
        run_on_virtual_loop(run_in_virtual_time())


async def test_plain_handler_is_retried_in_same_session_after_error(workpool: Kit) -> None:
    @handler(retry=Retry(on=ConnectionError, backoff=0.01))
    def fail_twice(session: BlockingSession) -> dict[str, str]:
        if session.retry < 2:
            raise ConnectionError
        return {"retry": str(session.retry)}

    result = await workpool.run_session(fail_twice)
    assert (result.outcome, dict(result.metadata)) == ("completed", {"retry": "2"})
    assert len(workpool.recorder.of(HandlerRetried)) == 2


class HandlerChoosingPlugin:
    """A plugin whose hook chooses the given handler for each item."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @hookimpl
    def workpool_session_handler(self) -> Any:
        return self.answer


@handler(metadata={"never": "asked"})
def decorated_handler(_: BlockingSession) -> str:
    return threading.current_thread().name


@pytest.mark.parametrize(
    "answer",
    [
        decorated_handler,
        Handler(name="any.name", call=decorated_handler, blocking=True, plugin="any"),
    ],
    ids=["marked", "handler"],
)
async def test_plain_handler_runs_on_handler_thread_if_plugin_hook_chooses_it(
    workpool: Kit, answer: Any
) -> None:
    result = await workpool.run_session(HandlerChoosingPlugin(answer))
    assert result.metadata == {"workpool.result": '"workpool-handler-1"'}


class PluginWithHandlerMethod:
    @handler
    def return_session_id(self, session: BlockingSession) -> str:
        return session.id


async def test_plain_method_of_plugin_runs_as_handler(workpool: Kit) -> None:
    result = await workpool.run_session(PluginWithHandlerMethod)
    assert result.metadata["workpool.result"] == f'"{result.item.session_id}"'


async def test_heartbeats_continue_while_a_plain_handler_blocks_its_thread(
    workpool: Kit, thread_gate: ThreadGate, frequent_heartbeats: None
) -> None:
    del frequent_heartbeats

    @handler
    def block_thread(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    [item] = workpool.enqueue()
    async with workpool.pool(block_thread):
        await thread_gate.wait_until_thread_is_blocked()
        await workpool.faults.wait_for("heartbeat", work_id=item.id, count=10, answered=True)
        thread_gate.opened.set()
        assert (await workpool.wait_for(SessionFinished)).outcome == "completed"


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_plain_handler_that_blocks_longer_than_its_lease_keeps_it(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    @handler
    def block_thread(_: BlockingSession) -> None:
        time.sleep(45)

    (item,) = control_plane.enqueue()
    async with make_pool(block_thread, lease_ttl=20):
        finished = await recorder.wait_for(SessionFinished, timeout=90)
    assert finished.outcome == "completed"
    kinds = [record.kind for record in control_plane.history.records_of_item(item.id)]
    assert "lapsed" not in kinds
    assert kinds.count("heartbeat") >= 5
    assert control_plane.summary().overlapping == 0


def test_embedding_program_ends_although_a_thread_hangs(
    thread_gate: ThreadGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.run` waits for all tasks, so no task may wait for the thread."""
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.5)

    @handler
    def block_thread(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    async def run_embedded_pool() -> Supervisor:
        async with Kit() as kit:
            kit.enqueue()
            pool = kit.pool(block_thread, drain_timeout=0)
            async with pool:
                await thread_gate.wait_until_thread_is_blocked()
            return pool

    began = time.monotonic()
    assert asyncio.run(run_embedded_pool()).abandoned == 1
    assert time.monotonic() - began < 40


def test_program_that_never_closes_its_pool_ends_although_thread_hangs(
    thread_gate: ThreadGate,
) -> None:
    @handler
    def block_thread(_: BlockingSession) -> None:
        thread_gate.block_until_gate_opens()

    async def leave_worker_pool_unclosed() -> None:
        async with Kit() as kit:
            kit.enqueue()
            await kit.pool(block_thread).__aenter__()
            await thread_gate.wait_until_thread_is_blocked()

    began = time.monotonic()
    asyncio.run(leave_worker_pool_unclosed())
    assert time.monotonic() - began < 50
