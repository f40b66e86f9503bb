"""Interruptions of a running handler, and the calls that the handler may still make."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.redelivered_items import enqueue_redelivered_item
from workpool import LeaseLost, Session, SessionEnded, handler, hookimpl
from workpool.errors import ConflictError, RefusedError, TransientError
from workpool.events import (
    DrainFinished,
    ItemDeclined,
    ItemReceived,
    SessionFinished,
    SessionStarted,
    StopRequested,
)
from workpool.testing import Hold, expire_lease, lost, status
from workpool.testing.bounded_wait import BoundedCondition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder


class CancellationIgnoringHandler:
    """A handler that ignores its cancellation and then records the error of a metadata write."""

    def __init__(self) -> None:
        self.cancelled = self.left = False
        self.may_end = asyncio.Event()
        self.raised: list[type[BaseException]] = []
        self._changes = BoundedCondition()

    @handler
    async def ignore_cancellation(self, session: Session) -> dict[str, str]:
        """Swallow the cancellation, try to write metadata, and wait until `may_end` is set."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            self._changes.notify_all()
        try:
            await session.update_metadata({"late": "yes"})
        except Exception as error:  # noqa: BLE001 - noted, whatever it is
            self.raised.append(type(error))
        while not self.may_end.is_set():
            with suppress(asyncio.CancelledError):
                await self.may_end.wait()
        self.left = True
        return {"late": "result"}

    async def wait_until_cancelled(self) -> None:
        await self._changes.wait_until(lambda: self.cancelled, lambda: "not cancelled")


@pytest.fixture
def cancellation_ignoring_handler() -> Iterator[CancellationIgnoringHandler]:
    """Return a handler that ignores its cancellation, and end it after the test."""
    made = CancellationIgnoringHandler()
    yield made
    made.may_end.set()


@pytest.fixture
def short_cancellation_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.handler_executor.REPEAT_SECONDS", 0.05)


def log_levels_of_message(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.levelname for record in caplog.records if text in record.getMessage()]


async def test_stop_request_interrupts_session_and_makes_its_stopping_attribute_true(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, heartbeat_now: Any
) -> None:
    seen: list[tuple[bool, bool]] = []

    @handler
    async def wait_for_interruption(session: Session) -> None:
        seen.append((session.stopping, session.draining))
        await session.interrupted()
        # The second call must return at once, because the session is interrupted already.
        await session.interrupted()
        seen.append((session.stopping, session.draining))

    (item,) = control_plane.enqueue()
    async with make_pool(wait_for_interruption, block_ms=20) as supervisor:
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id)
        heartbeat_now(item.id)
        await recorder.wait_for(SessionFinished)
        assert supervisor.status().ready
    assert seen == [(False, False), (True, False)]
    assert [event.item.id for event in recorder.of(StopRequested)] == [item.id]


async def test_drain_interrupts_session(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    seen: list[tuple[bool, bool]] = []

    @handler
    async def wait_for_interruption(session: Session) -> None:
        await session.interrupted()
        seen.append((session.stopping, session.draining))

    control_plane.enqueue()
    async with make_pool(wait_for_interruption):
        await recorder.wait_for(SessionStarted)
    assert seen == [(False, True)]
    assert recorder.of(SessionFinished)[0].outcome == "completed"


async def test_handler_reads_item_and_lease_time_and_logger_from_session(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    remaining: list[float] = []

    @handler
    async def log_and_store_lease_time(session: Session) -> None:
        remaining.append(session.lease_remaining)
        session.log.warning("at log_and_store_lease_time")

    (item,) = control_plane.enqueue(metadata={"a": "b"})
    async with make_pool(log_and_store_lease_time, lease_ttl=120):
        session = (await recorder.wait_for(SessionFinished)).session
    assert (session.id, session.item.id) == (item.session_id, item.id)
    assert session.item.metadata == {"a": "b"}
    assert not session.redelivered
    assert 60 < remaining[0] <= 120
    (record,) = [
        record for record in caplog.records if record.message == "at log_and_store_lease_time"
    ]
    assert getattr(record, "work_id", None) == item.id


@pytest.mark.usefixtures("short_cancellation_interval")
async def test_stuck_handler_keeps_its_slot_and_session_until_it_ends(
    cancellation_ignoring_handler: CancellationIgnoringHandler,
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (item,) = control_plane.enqueue()
    control_plane.enqueue(session_id=item.session_id)
    settings = {"concurrency": 2, "session_timeout": 0.02, "block_ms": 20}
    async with make_pool(
        cancellation_ignoring_handler, **settings, reclaim_older_than_ms=20
    ) as supervisor:
        await cancellation_ignoring_handler.wait_until_cancelled()
        await recorder.wait_for(ItemDeclined, lambda _: not supervisor.status().ready)
        declined = len(recorder.of(ItemDeclined))
        await recorder.wait_for(ItemDeclined, count=declined + 2)
        assert supervisor.status().running == 1
        assert not recorder.of(SessionFinished)
        assert log_levels_of_message(caplog, "handler ignores its cancellation") == ["CRITICAL"]
        [report] = [each for each in caplog.records if "ignores its cancellation" in each.message]
        # The stack in the log record contains the line at which the handler waits.
        assert "await self.may_end.wait()" in str(report.stack_info)
        assert supervisor.status().reasons == ("handlers that ignore their cancellation: 1",)
        cancellation_ignoring_handler.may_end.set()
        finished = await recorder.wait_for(SessionFinished)
        assert supervisor.status().ready
        assert finished.outcome == "timed_out"
        cancellation_ignoring_handler.cancelled = False
        control_plane.operations.stop_item(
            control_plane.environments[0], recorder.of(ItemDeclined)[0].item.id
        )
    assert cancellation_ignoring_handler.raised == [SessionEnded]


@pytest.mark.usefixtures("short_cancellation_interval")
@pytest.mark.parametrize("timeout", [None, 60.0])
async def test_drain_does_not_wait_for_stuck_handler(
    cancellation_ignoring_handler: CancellationIgnoringHandler, control_plane: ControlPlane,
    make_pool: Any, recorder: Recorder, timeout: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("workpool.pool.drain.AFTER_DEADLINE_SECONDS", 0.1)
    control_plane.enqueue()
    async with make_pool(cancellation_ignoring_handler, session_timeout=0.02) as supervisor:
        await cancellation_ignoring_handler.wait_until_cancelled()
        async with asyncio.timeout(20):
            await supervisor.drain(timeout=timeout)
    assert supervisor.abandoned == 1
    assert recorder.of(DrainFinished)[0].result == "killed"
    assert not cancellation_ignoring_handler.left
    cancellation_ignoring_handler.may_end.set()
    await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=20)
    assert cancellation_ignoring_handler.left


async def test_metadata_write_after_lost_lease_raises_lease_lost_and_sends_nothing(
    cancellation_ignoring_handler: CancellationIgnoringHandler,
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    heartbeat_now: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(cancellation_ignoring_handler, block_ms=20):
        await recorder.wait_for(SessionStarted)
        expire_lease(control_plane, item.id)
        control_plane.operations.ack_item(control_plane.environments[0], item.id, "another")
        heartbeat_now(item.id)
        await cancellation_ignoring_handler.wait_until_cancelled()
        cancellation_ignoring_handler.may_end.set()
        await recorder.wait_for(SessionFinished)
    assert cancellation_ignoring_handler.raised == [LeaseLost]
    assert not faults.of("update", "stop")


async def test_metadata_write_after_stop_by_another_client_raises_session_ended(
    cancellation_ignoring_handler: CancellationIgnoringHandler,
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    heartbeat_now: Any,
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(cancellation_ignoring_handler, block_ms=20):
        await recorder.wait_for(SessionStarted)
        control_plane.operations.stop_item(control_plane.environments[0], item.id, force=True)
        heartbeat_now(item.id)
        await cancellation_ignoring_handler.wait_until_cancelled()
        cancellation_ignoring_handler.may_end.set()
        await recorder.wait_for(SessionFinished)
    assert cancellation_ignoring_handler.raised == [SessionEnded]
    assert not faults.of("update", "stop")


async def test_use_of_session_after_its_end_raises_and_sends_no_request(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    """A task that a handler left running must not write to an item that has ended."""

    @handler
    async def return_at_once(_: Session) -> None:
        pass

    control_plane.enqueue()
    async with make_pool(return_at_once):
        session = (await recorder.wait_for(SessionFinished)).session
        assert session.lease_remaining == 0
        with pytest.raises(SessionEnded):
            await session.update_metadata({"late": "yes"})
    with pytest.raises((SessionEnded, LeaseLost)):
        await session.update_metadata({"later": "yes"})
    assert not faults.of("update")


@pytest.mark.usefixtures("frequent_heartbeats")
async def test_metadata_write_in_progress_is_cancelled_when_lease_is_lost(
    control_plane: ControlPlane, faults: Faults, make_pool: Any, recorder: Recorder
) -> None:
    """A call that waits for an answer must not hide the lost lease from the handler."""
    hold = Hold()
    faults.add(hold, "update")
    raised: list[BaseException] = []

    @handler
    async def write_metadata(session: Session) -> None:
        try:
            await session.update_metadata({"a": "b"})
        except BaseException as error:
            raised.append(error)
            raise

    (item,) = control_plane.enqueue()
    async with make_pool(write_metadata):
        await hold.reached()
        expire_lease(control_plane, item.id)
        control_plane.operations.ack_item(control_plane.environments[0], item.id, "another")
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "lease_lost"
    assert isinstance(raised[0], LeaseLost | asyncio.CancelledError)
    assert len(faults.of("update")) == 1


async def test_metadata_writes_of_handler_are_merged_and_return_updated_item(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any
) -> None:
    answers: list[dict[str, str]] = []

    @handler
    async def write_metadata_twice(session: Session) -> dict[str, str]:
        answers.append(dict((await session.update_metadata({"a": "1", "b": "2"})).metadata))
        answers.append(dict((await session.update_metadata({"a": None})).metadata))
        return {"c": "3"}

    (item,) = control_plane.enqueue(metadata={"given": "yes"})
    async with make_pool(write_metadata_twice):
        final = await wait_for_session_end(item.id)
    assert answers == [{"given": "yes", "a": "1", "b": "2"}, {"given": "yes", "b": "2"}]
    assert final.metadata == {"given": "yes", "b": "2", "c": "3"}
    assert final.request_names == ["ack", "heartbeat", "update", "update", "update", "stop"]


@pytest.mark.parametrize("fault", [lost, lambda: status(503), lambda: status(429)])
async def test_metadata_write_is_repeated_after_transient_error(
    run_one_item: Any, faults: Faults, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    monkeypatch.setattr("workpool.pool.item_requests.RETRY_SECONDS", 0.01)

    @handler
    async def write_metadata(session: Session) -> None:
        await session.update_metadata({"a": "1"})

    faults.add(fault(), "update", times=2)
    final = await run_one_item(write_metadata)
    assert (final.outcome, final.metadata) == ("completed", {"a": "1"})
    assert len(faults.of("update")) == 3


@pytest.mark.parametrize(
    ("code", "error"), [(400, RefusedError), (404, RefusedError), (409, ConflictError)]
)
async def test_refused_metadata_write_raises_in_handler(
    run_one_item: Any, faults: Faults, code: int, error: type[Exception]
) -> None:
    @handler
    async def write_metadata(session: Session) -> None:
        await session.update_metadata({"a": "1"})

    faults.add(status(code), "update", times=1)
    final = await run_one_item(write_metadata)
    assert final.outcome == "failed"
    assert type(final.finished.error) is error
    assert final.metadata == {"workpool.error": error.__name__}


async def test_metadata_write_that_keeps_failing_raises_transient_error_in_handler(
    run_one_item: Any, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workpool.pool.session_backend.UPDATE_SECONDS", 3.0)

    @handler
    async def write_metadata(session: Session) -> None:
        with pytest.raises(TransientError):
            await session.update_metadata({"a": "1"})

    rule = faults.add(status(503), "update")
    final = await run_one_item(write_metadata)
    assert final.outcome == "completed"
    assert rule.hits >= 1


@pytest.mark.parametrize("patch", [{"a": 1}, {"a": "\ud800"}])
async def test_metadata_value_that_is_not_valid_text_raises_in_handler(
    run_one_item: Any, faults: Faults, patch: Any
) -> None:
    @handler
    async def write_invalid_metadata(session: Session) -> None:
        await session.update_metadata(patch)

    final = await run_one_item(write_invalid_metadata)
    assert final.outcome == "failed"
    assert isinstance(final.finished.error, TypeError | ValueError)
    # The only write is that of the session's error, so the invalid metadata were not sent.
    assert len(faults.of("update")) == 1


class ContextEntryRecordingPlugin:
    """A plugin whose context records when it is entered and left."""

    def __init__(self, name: str, trace: list[str]) -> None:
        self.name = name
        self.trace = trace

    @hookimpl
    def workpool_wrap_session(self, session: Session) -> Any:
        return self.context_that_records_its_calls(session)

    @asynccontextmanager
    async def context_that_records_its_calls(self, _: Session) -> AsyncIterator[None]:
        self.trace.append(f"enter {self.name}")
        try:
            yield
        except BaseException as error:
            self.trace.append(f"{self.name} saw {type(error).__name__}")
            raise
        finally:
            self.trace.append(f"leave {self.name}")


def make_plugin_with_name(name: str, trace: list[str]) -> ContextEntryRecordingPlugin:
    """Return a plugin whose class has this name, because a plugin is named after its class."""
    built: ContextEntryRecordingPlugin = type(name, (ContextEntryRecordingPlugin,), {})(name, trace)
    return built


async def test_plugin_contexts_are_entered_in_plugin_order_and_left_in_reverse(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    trace: list[str] = []

    @handler
    async def record_handler_call(_: Session) -> None:
        trace.append("call")

    control_plane.enqueue()
    async with make_pool(
        make_plugin_with_name("A", trace), record_handler_call, make_plugin_with_name("B", trace)
    ):
        await recorder.wait_for(SessionFinished)
    assert trace == ["enter A", "enter B", "call", "leave B", "leave A"]


async def test_exception_of_handler_passes_through_context_managers_of_plugins(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    trace: list[str] = []

    @handler
    async def raise_error(_: Session) -> None:
        raise ValueError

    control_plane.enqueue()
    async with make_pool(make_plugin_with_name("A", trace), raise_error):
        finished = await recorder.wait_for(SessionFinished)
    assert finished.outcome == "failed"
    assert trace == ["enter A", "A saw ValueError", "leave A"]


class ErrorRaisingPlugin:
    """A plugin that raises an error in its hook, or when its context is entered or left."""

    def __init__(self, where: str) -> None:
        self.where = where

    @hookimpl
    def workpool_wrap_session(self, session: Session) -> Any:
        if self.where == "hook":
            raise LookupError("in the hook")
        return self.raising_context(session)

    @asynccontextmanager
    async def raising_context(self, _: Session) -> AsyncIterator[None]:
        if self.where == "enter":
            raise LookupError("on entering")
        yield
        if self.where == "leave":
            raise LookupError("on leaving")


@pytest.mark.parametrize("where", ["hook", "enter", "leave"])
async def test_exception_of_plugin_context_fails_session(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any, where: str
) -> None:
    ran: list[bool] = []

    @handler
    async def record_handler_run(_: Session) -> dict[str, str]:
        ran.append(True)
        return {"a": "b"}

    trace: list[str] = []
    (item,) = control_plane.enqueue()
    async with make_pool(
        make_plugin_with_name("A", trace), ErrorRaisingPlugin(where), record_handler_run
    ):
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": "LookupError"}
    assert bool(ran) is (where == "leave")
    assert trace == ([] if where == "hook" else ["enter A", "A saw LookupError", "leave A"])


class ErrorSwallowingPlugin:
    """A plugin whose context swallows errors."""

    @hookimpl
    def workpool_wrap_session(self, session: Session) -> Any:
        return self.context_swallowing_errors(session)

    @asynccontextmanager
    async def context_swallowing_errors(self, _: Session) -> AsyncIterator[None]:
        with suppress(ValueError):
            yield


async def test_plugin_context_can_swallow_exception_of_handler(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any
) -> None:
    @handler
    async def raise_error(_: Session) -> None:
        raise ValueError

    (item,) = control_plane.enqueue()
    async with make_pool(ErrorSwallowingPlugin(), raise_error):
        final = await wait_for_session_end(item.id)
    assert (final.outcome, final.request_names) == ("completed", ["ack", "heartbeat", "stop"])


async def test_redelivered_item_has_attempt_number_two_before_handler_is_called(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any, recorder: Recorder
) -> None:
    seen: list[Any] = []

    @handler
    async def record_item_metadata(session: Session) -> None:
        item = control_plane.operations.get_item(control_plane.environments[0], session.item.id)
        seen.append((session.redelivered, dict(item.metadata)))

    work_id = enqueue_redelivered_item(control_plane)
    async with make_pool(record_item_metadata):
        final = await wait_for_session_end(work_id)
    # The attempt number was written before the handler was called.
    assert seen == [(True, {"workpool.attempt": "2"})]
    assert final.request_names == ["ack", "heartbeat", "update", "stop"]
    assert [event.origin for event in recorder.of(ItemReceived)] == ["redelivered"]


@pytest.mark.parametrize(
    ("before", "after"), [("2", "3"), ("9", "10"), ("nonsense", "2"), ("-4", "2"), ("9" * 40, "2")]
)
async def test_attempt_number_continues_from_metadata(
    control_plane: ControlPlane, make_pool: Any, wait_for_session_end: Any, before: str, after: str
) -> None:
    @handler
    async def return_at_once(_: Session) -> None:
        pass

    work_id = enqueue_redelivered_item(control_plane, **{"workpool.attempt": before})
    async with make_pool(return_at_once):
        final = await wait_for_session_end(work_id)
    assert final.metadata == {"workpool.attempt": after}


@pytest.mark.parametrize(("limit", "runs"), [(1, False), (2, True)])
async def test_attempt_beyond_max_attempts_fails_session_before_handler_runs(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    wait_for_session_end: Any,
    limit: int,
    *,
    runs: bool,
) -> None:
    @handler
    async def return_at_once(_: Session) -> None:
        pass

    work_id = enqueue_redelivered_item(control_plane)
    async with make_pool(return_at_once, max_attempts=limit):
        final = await wait_for_session_end(work_id)
    assert bool(recorder.of(SessionStarted)) is runs
    assert final.item.state == "stopped"
    assert final.outcome == ("completed" if runs else "failed")
    if not runs:
        assert final.request_names == ["ack", "heartbeat", "update", "stop"]
        assert final.metadata["workpool.error"] == "AttemptsExceeded"


async def test_session_does_not_count_as_redelivered_if_item_had_no_earlier_lease(
    run_one_item: Any,
) -> None:
    @handler
    async def return_value_of_redelivered(session: Session) -> dict[str, str]:
        return {"redelivered": str(session.redelivered)}

    final = await run_one_item(return_value_of_redelivered, max_attempts=1)
    assert final.metadata == {"redelivered": "False"}
