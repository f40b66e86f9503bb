"""Failures of the lease renewer's thread, which end an embedded pool and are reported at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, Supervisor, handler
from workpool.errors import LeaseRenewerError, WorkpoolError
from workpool.events import SessionFinished, SessionStarted
from workpool.exporter import Exporter
from workpool.pool.lease_renewer import LeaseRenewer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workpool import Settings
    from workpool.server import ControlPlane
    from workpool.testing import Faults, Recorder


@handler
async def endless_handler(_: Session) -> None:
    await asyncio.Event().wait()


class LogHandlerThatRaises(logging.Handler):
    """A log handler that raises for every message with a given beginning."""

    def __init__(self, beginning: str, error: BaseException) -> None:
        super().__init__()
        self.beginning = beginning
        self.error = error

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.beginning):
            raise self.error


@pytest.fixture
def log_handler_that_raises(request: pytest.FixtureRequest) -> Iterator[float]:
    """Add a log handler that raises. Yield the test's value of the setting `max_block`."""
    beginning, max_block, error = request.param
    added = LogHandlerThatRaises(beginning, error)
    logging.getLogger().addHandler(added)
    yield max_block
    logging.getLogger().removeHandler(added)


@pytest.fixture(autouse=True)
def check_no_renewer_thread_left() -> Iterator[None]:
    yield
    assert not [each for each in threading.enumerate() if each.name.startswith("workpool-lease")]


async def run_pool_on_thread(supervisor: Supervisor) -> WorkpoolError | None:
    """Run the pool on its own thread and loop; return the error that ended it."""
    try:
        await asyncio.to_thread(asyncio.run, supervisor.run(until_empty=True))
    except WorkpoolError as error:
        return error
    return None


@pytest.fixture
def relax_time_limits() -> None:
    """Override the fixture of this name: these tests need the default limit of loop lag."""


@pytest.mark.parametrize(
    "log_handler_that_raises",
    [
        ("event loop is blocked", 300, RuntimeError("log")),
        ("event loop is blocked", 300, SystemExit("log")),
        ("event loop blocked", 1.5, RuntimeError("log")),
    ],
    ids=["warning", "exit", "report"],
    indirect=True,
)
async def test_pool_fails_if_logging_handler_raises_while_event_loop_is_blocked(
    control_plane: ControlPlane,
    faults: Faults,
    make_settings: Callable[..., Settings],
    log_handler_that_raises: float,
) -> None:
    called, may_end = threading.Event(), threading.Event()
    calls: list[BaseException | None] = []

    @handler
    async def block_event_loop(_: Session) -> None:
        may_end.wait(50)  # This call blocks the event loop.

    def record_pool_error() -> None:
        calls.append(supervisor.status().error)
        called.set()

    (item,) = control_plane.enqueue()
    supervisor = Supervisor(
        make_settings(max_block=log_handler_that_raises), plugins=[block_event_loop]
    )
    supervisor.on_blocked = record_pool_error
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_pool_on_thread(supervisor))
        try:
            assert await asyncio.to_thread(called.wait, 40)
            sent = len(faults.of("heartbeat", work_id=item.id))
        finally:
            may_end.set()
    error = running.result()
    assert isinstance(error, LeaseRenewerError)
    assert error.__cause__ is not None
    assert len(faults.of("heartbeat", work_id=item.id)) == sent
    assert not faults.of("stop")
    assert isinstance(supervisor.status().error, LeaseRenewerError)
    assert isinstance(calls[-1], LeaseRenewerError) or log_handler_that_raises == 1.5


async def test_exception_on_renewer_thread_calls_blocked_loop_callback_while_loop_runs(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = threading.Event()

    def raise_system_exit(_: Exporter) -> None:
        raise SystemExit("from the exporter")

    monkeypatch.setattr(
        Exporter, "_health", property(raise_system_exit, lambda *_: None), raising=False
    )
    control_plane.enqueue()
    supervisor = make_pool(endless_handler, metrics_listen="127.0.0.1:0")
    supervisor.on_blocked = called.set
    async with supervisor:
        await recorder.wait_for(SessionStarted)
        host, port = supervisor.metrics_url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await asyncio.to_thread(called.wait, 20)
        assert isinstance(supervisor.status().error, LeaseRenewerError)
        finished = await recorder.wait_for(SessionFinished)
        assert finished.outcome == "lease_lost"
        with pytest.raises(LeaseRenewerError):
            await supervisor.wait()
        writer.close()


async def test_pool_continues_after_loop_was_blocked_for_max_block(
    control_plane: ControlPlane, make_settings: Callable[..., Settings]
) -> None:
    """The pool calls `on_blocked`, and continues although the event loop was blocked."""
    called, may_end = threading.Event(), threading.Event()

    @handler
    async def block_event_loop(_: Session) -> None:
        may_end.wait(50)  # This call blocks the event loop.

    control_plane.enqueue()
    supervisor = Supervisor(make_settings(max_block=1), plugins=[block_event_loop])
    supervisor.on_blocked = called.set
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run_pool_on_thread(supervisor))
        try:
            assert await asyncio.to_thread(called.wait, 40)
        finally:
            may_end.set()
    assert running.result() is None
    assert supervisor.status().error is None


async def test_pool_fails_and_sends_nothing_for_item_after_lease_renewer_failed(
    control_plane: ControlPlane,
    faults: Faults,
    make_pool: Any,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (item,) = control_plane.enqueue()

    def crash_renewer(_: LeaseRenewer) -> float:
        raise ZeroDivisionError("a bug of the lease renewer")

    async with make_pool(endless_handler) as supervisor:
        await recorder.wait_for(SessionStarted)
        monkeypatch.setattr(LeaseRenewer, "_end_or_renew_leases", crash_renewer)
        finished = await recorder.wait_for(SessionFinished)
        assert finished.outcome == "lease_lost"
        with pytest.raises(LeaseRenewerError) as caught:
            await supervisor.wait()
    assert caught.value.__cause__ is not None
    assert [request.op for request in faults.of(work_id=item.id)] == ["ack", "heartbeat"]
    assert (
        control_plane.operations.get_item(control_plane.environments[0], item.id).state == "active"
    )
