"""The session attributes that handlers read, the plugin contexts of a session, and its log."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Release, Session, current_session, handler, hookimpl
from workpool.errors import ResultError
from workpool.events import SessionFinished, SessionStarted
from workpool.testing import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from workpool.server import ControlPlane
    from workpool.testing import Kit, Recorder


class ConnectionOpeningPlugin:
    """A plugin whose context opens a connection and records how the session ends."""

    def __init__(self) -> None:
        self.connections: list[Any] = []
        self.outcomes: list[str | None] = []
        self.errors: list[type[BaseException] | None] = []

    @hookimpl
    @asynccontextmanager
    async def workpool_wrap_session(self, session: Session) -> AsyncIterator[None]:
        assert current_session() is session
        assert session.outcome is None
        session.state["connection"] = f"to {session.id}"
        error: type[BaseException] | None = None
        try:
            yield
        except BaseException as raised:
            error = type(raised)
            raise
        finally:
            self.outcomes.append(session.outcome)
            self.errors.append(error)


async def return_none(_: Session) -> None:
    return None


async def failing_handler(_: Session) -> None:
    raise ValueError


async def releasing_handler(_: Session) -> None:
    raise Release("later")


async def wrong_result_handler(_: Session) -> Any:
    return object()


async def hanging_handler(_: Session) -> None:
    await asyncio.Event().wait()


@in_virtual_time
@pytest.mark.parametrize(
    ("act", "outcome", "error"),
    [
        (return_none, "completed", None),
        (failing_handler, "failed", ValueError),
        (releasing_handler, "released", Release),
        (wrong_result_handler, "failed", ResultError),
        (hanging_handler, "stalled", asyncio.CancelledError),
    ],
    ids=["returned", "raised", "released", "wrong_result", "stalled"],
)
async def test_context_manager_of_plugin_reads_outcome_after_handler_ended(
    workpool: Kit,
    act: Callable[[Session], Awaitable[Any]],
    outcome: str,
    error: type[BaseException] | None,
) -> None:
    @handler
    async def check_connection_and_act(session: Session) -> Any:
        assert session.state["connection"] == f"to {session.id}"
        return await act(session)

    connecting = ConnectionOpeningPlugin()
    result = await workpool.run_session(check_connection_and_act, connecting, stall_timeout=5)
    assert connecting.outcomes == [outcome] == [result.outcome]
    assert connecting.errors == [error]


async def test_context_manager_of_plugin_reads_outcome_stopped_after_stop_request(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder, heartbeat_now: Any
) -> None:
    @handler
    async def wait_for_interruption(session: Session) -> None:
        await session.interrupted()

    connecting = ConnectionOpeningPlugin()
    (item,) = control_plane.enqueue()
    async with make_pool(wait_for_interruption, connecting):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        finished = await recorder.wait_for(SessionFinished)
    assert connecting.outcomes == ["stopped"] == [finished.outcome]


async def test_current_session_is_available_in_tasks_and_threads_of_handler(
    make_pool: Any, control_plane: ControlPlane, recorder: Recorder
) -> None:
    seen: dict[str, list[Session | None]] = {}
    both = asyncio.Barrier(2)

    async def read_current_session() -> Session | None:
        return current_session()

    @handler
    async def record_current_session(session: Session) -> None:
        await both.wait()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(read_current_session())
        seen[session.id] = [
            current_session(),
            task.result(),
            await asyncio.to_thread(current_session),
        ]

    control_plane.enqueue(2)
    async with make_pool(record_current_session, concurrency=2):
        await recorder.wait_for(SessionFinished, count=2)
    sessions = [event.session for event in recorder.of(SessionFinished)]
    assert seen == {session.id: [session] * 3 for session in sessions}
    assert current_session() is None


@in_virtual_time
async def test_deadline_of_session_follows_from_session_timeout(
    workpool: Kit,
) -> None:
    left: list[float | None] = []

    @handler
    async def record_seconds_until_deadline(session: Session) -> None:
        now = asyncio.get_running_loop().time()
        left.append(None if session.deadline is None else session.deadline - now)

    await workpool.run_session(record_seconds_until_deadline)
    await workpool.run_session(record_seconds_until_deadline, session_timeout=60)
    none, seconds = left
    assert none is None
    assert seconds is not None
    assert math.isclose(seconds, 60)


@in_virtual_time
async def test_session_deadline_is_earlier_after_drain_or_stop_request(workpool: Kit) -> None:
    left: list[float] = []

    @handler(timeout=3600)
    async def record_seconds_until_deadline(session: Session) -> None:
        await session.interrupted()
        assert session.deadline is not None
        left.append(session.deadline - asyncio.get_running_loop().time())

    workpool.enqueue()
    async with workpool.pool(record_seconds_until_deadline) as supervisor:
        await workpool.wait_for(SessionStarted)
        await supervisor.drain(timeout=45)
        await workpool.wait_for(SessionFinished)
    (item,) = workpool.enqueue()
    async with workpool.pool(record_seconds_until_deadline, stop_grace=15):
        await workpool.wait_for(SessionStarted)
        workpool.stop(item)
        await workpool.wait_for(SessionFinished)
    assert [round(each) for each in left] == [45, 15]


@in_virtual_time
async def test_drain_without_timeout_does_not_change_session_deadline_set_by_handler_timeout(
    workpool: Kit,
) -> None:
    left: list[float | None] = []

    @handler(timeout=100)
    async def record_seconds_until_deadline(session: Session) -> None:
        await session.interrupted()
        assert session.deadline is not None
        left.append(round(session.deadline - asyncio.get_running_loop().time()))

    workpool.enqueue()
    async with workpool.pool(record_seconds_until_deadline) as supervisor:
        await workpool.wait_for(SessionStarted)
        await asyncio.sleep(30)
        await supervisor.drain(timeout=None)
    assert left == [70]
