"""The renewer thread: start, end, failures, and its monitoring of the handlers' loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from contextvars import copy_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.manual_clock import ManualClock
from workpool import Settings
from workpool.errors import LeaseRenewerError, ListenError
from workpool.events import Event, HeartbeatFinished, LoopLagMeasured
from workpool.pool import diagnostics, lease_renewer
from workpool.pool.diagnostics import LoopMonitor
from workpool.pool.item_requests import HeartbeatSender
from workpool.pool.lease import Lease
from workpool.pool.lease_renewer import LeaseRenewer, RenewerCallbacks
from workpool.pool.machine_pauses import MachinePauseDetector, lease_clock
from workpool.pool.pool_item import PoolItem
from workpool.server import Operations
from workpool.testing.bounded_wait import BoundedCondition
from workpool.testing.fault import Fault
from workpool.testing.local_client import FaultScript, LocalClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from workpool.testing.fault_rules import Request

ENVIRONMENT = "env_00000000000070008000000000000001"
CHECK_SECONDS = 0.02


class LeaseRenewerTestbed:
    """Makes renewers, records their reports, and has a clock that the test can move forward."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.changes = BoundedCondition()
        self.events: list[Event] = []
        self.failures: list[LeaseRenewerError] = []
        self.ended: list[LeaseRenewerError | None] = []
        self.reported: list[str] = []
        self.blocked = threading.Event()
        self.ahead = 0.0
        self.fault: BaseException | None = None
        self.script = FaultScript()
        self.sent = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.operations = Operations(
            [ENVIRONMENT], now=lambda: 1_772_366_400.0 + self.lease_clock()
        )

    def lease_clock(self) -> float:
        return lease_clock() + self.ahead

    def fault_for_request(self, request: Request) -> Fault | None:
        self.threads.add(threading.current_thread().name)
        self.sent.release()
        return self.script(request)

    def record_event(self, kind: Any, /, *values: Any) -> None:
        """Record an event; called on the renewer thread."""
        event = kind(*values)
        if self.fault is not None:
            raise self.fault
        self.events.append(event)
        self._notify_test_on_event_loop()

    def record_lease_change(self, item: PoolItem) -> None:
        assert item.lease is not None
        self.reported.append(item.lease.status)
        self.changes.notify_all()

    def record_renewer_failure(self, error: LeaseRenewerError) -> None:
        self.failures.append(error)
        self.changes.notify_all()

    def record_end_of_renewal(self, error: LeaseRenewerError | None) -> None:
        """Record the end of renewal; called on the renewer thread."""
        self.ended.append(error)
        self.blocked.set()
        self._notify_test_on_event_loop()

    def _notify_test_on_event_loop(self) -> None:
        with contextlib.suppress(RuntimeError):  # The test has closed the loop.
            self.loop.call_soon_threadsafe(self.changes.notify_all)

    def make_renewer(
        self, *services: contextlib.AbstractAsyncContextManager[Any], **values: Any
    ) -> LeaseRenewer:
        settings = self.make_settings(**values)
        return LeaseRenewer(
            settings,
            self.lease_clock,
            self.lease_clock,
            lambda: LocalClient(self.operations, settings, faults=self.fault_for_request),
            RenewerCallbacks(
                cast("Any", self.record_event),
                self.record_lease_change,
                self.record_renewer_failure,
                self.record_end_of_renewal,
            ),
            services,
        )

    def make_settings(self, **values: Any) -> Settings:
        return Settings(
            environment_id=ENVIRONMENT, base_url="http://127.0.0.1:1", token=ENVIRONMENT, **values
        )

    async def claim_item(self) -> PoolItem:
        """Claim an item and begin its lease, before the renewer thread starts."""
        self.operations.enqueue(ENVIRONMENT)
        async with LocalClient(self.operations, self.make_settings()) as client:
            item = await client.poll()
            assert item is not None
            sent = self.lease_clock()
            ours = PoolItem(await client.ack(item.id), None, copy_context(), sent)
            ours.lease = Lease(ours.work_item, sent, ttl=60, request_timeout=10.0)
            pauses = MachinePauseDetector(self.lease_clock, self.lease_clock)
            heartbeats = HeartbeatSender(
                client, self.lease_clock, pauses, cast("Any", lambda *_: None)
            )
            await heartbeats.send_heartbeat(ours.lease)
        assert ours.lease.begun
        return ours

    async def add_leases_and_wait_for_heartbeats(
        self, renewer: LeaseRenewer, *items: PoolItem
    ) -> list[Lease]:
        """Give the leases to the renewer and wait for one heartbeat of each lease."""
        leases = []
        for item in items:
            assert item.lease is not None
            renewer.add_lease(item.lease, item)
            renewer.request_heartbeat(item.lease)
            leases.append(item.lease)
        await self.wait_for_heartbeats(len(items))
        return leases

    def heartbeat_results(self) -> list[str]:
        return [each.result for each in list(self.events) if isinstance(each, HeartbeatFinished)]

    async def wait_for_heartbeats(self, count: int) -> None:
        """Wait until `count` heartbeats have finished."""
        await self.wait_until(lambda: len(self.heartbeat_results()) >= count)

    async def wait_until(self, condition: Any) -> None:
        await self.changes.wait_until(
            condition, lambda: f"{self.heartbeat_results()} {self.failures}"
        )


@pytest.fixture(autouse=True)
def shorten_time_between_lease_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseRenewer, "check_seconds", CHECK_SECONDS)


@pytest.fixture(autouse=True)
def join_all_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # A thread that has reported its end may not have returned yet.
    assert set(threading.enumerate()) <= before


@pytest.fixture
async def testbed() -> LeaseRenewerTestbed:
    return LeaseRenewerTestbed()


def renewer_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "workpool-lease-renewer"]


async def test_heartbeats_are_sent_on_renewer_thread(testbed: LeaseRenewerTestbed) -> None:
    item = await testbed.claim_item()
    renewer = testbed.make_renewer()
    async with renewer:
        (thread,) = renewer_threads()
        assert thread.daemon
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        assert testbed.threads == {thread.name}
        assert renewer.held_leases() == [lease]
        renewer.remove_lease(lease)
        assert renewer.held_leases() == []


async def test_failed_start_of_renewer_raises_error_and_closes_opened_services(
    testbed: LeaseRenewerTestbed,
) -> None:
    opened: list[str] = []

    @contextlib.asynccontextmanager
    async def service_recording_open_and_close() -> AsyncIterator[None]:
        opened.append("first")
        try:
            yield
        finally:
            opened.append("closed")

    @contextlib.asynccontextmanager
    async def service_failing_to_listen() -> AsyncIterator[None]:
        raise ListenError("metrics_listen: taken")
        yield

    with pytest.raises(ListenError):
        await testbed.make_renewer(
            service_recording_open_and_close(), service_failing_to_listen()
        ).__aenter__()
    assert opened == ["first", "closed"]
    assert not testbed.failures


async def test_cancelled_start_of_renewer_leaves_no_thread(testbed: LeaseRenewerTestbed) -> None:
    hanging, release = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def service_that_opens_slowly() -> AsyncIterator[None]:
        hanging.set()
        await asyncio.to_thread(release.wait, 30)
        yield

    async with asyncio.TaskGroup() as group:
        starting = group.create_task(testbed.make_renewer(service_that_opens_slowly()).__aenter__())
        assert await asyncio.to_thread(hanging.wait, 30)
        starting.cancel()
        release.set()
    assert starting.cancelled()
    for thread in renewer_threads():
        await asyncio.to_thread(thread.join, 20)
    assert not renewer_threads()


async def test_close_of_renewer_is_bounded_and_logs_abandoned_thread(
    testbed: LeaseRenewerTestbed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    @contextlib.asynccontextmanager
    async def service_that_hangs_on_close() -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(release.wait, 20)

    monkeypatch.setattr(lease_renewer, "CLOSE_SECONDS", 0.05)
    async with testbed.make_renewer(service_that_hangs_on_close()):
        pass
    assert "lease renewer did not end" in caplog.text
    release.set()
    for thread in renewer_threads():
        await asyncio.to_thread(thread.join, 5)


async def test_error_while_closing_service_is_logged_and_not_fatal(
    testbed: LeaseRenewerTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    @contextlib.asynccontextmanager
    async def service_that_fails_on_close() -> AsyncIterator[None]:
        yield
        raise RuntimeError("dropped it")

    async with testbed.make_renewer(service_that_fails_on_close()):
        pass
    assert "dropped it" in caplog.text
    assert not testbed.failures


async def test_failure_of_renewer_thread_is_fatal_and_ends_all_leases_as_lost(
    testbed: LeaseRenewerTestbed,
) -> None:
    item, later = await testbed.claim_item(), await testbed.claim_item()
    renewer = testbed.make_renewer()
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        testbed.fault = ZeroDivisionError("in the check")
        await testbed.wait_until(lambda: testbed.failures)
        assert testbed.failures[0].__cause__ is testbed.fault
        assert (lease.status, lease.is_loss_confirmed) == ("lost", False)
        assert testbed.reported == ["lost"]
        assert later.lease is not None
        renewer.add_lease(later.lease, later)
        assert later.lease.status == "lost"
        # After the end of the renewer thread, these calls must do nothing and raise no error.
        renewer.request_last_heartbeat(lease, 10)
        renewer.remove_lease(lease)
    assert len(testbed.failures) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(), KeyboardInterrupt()])
async def test_exception_in_call_on_renewer_thread_is_fatal(
    testbed: LeaseRenewerTestbed, error: BaseException
) -> None:
    def raise_error() -> None:
        raise error

    item = await testbed.claim_item()
    renewer = testbed.make_renewer()
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        renewer.call_on_renewer_loop(raise_error)
        await testbed.wait_until(lambda: testbed.failures and testbed.ended)
        assert testbed.failures[0].__cause__ is error
        assert testbed.ended == testbed.failures
        assert not renewer.renewing
        assert lease.status == "lost"


@pytest.mark.parametrize("error", [SystemExit(), GeneratorExit()])
async def test_heartbeat_that_raises_base_exception_is_fatal(
    testbed: LeaseRenewerTestbed, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    async def raise_error_instead_of_heartbeat(*_: object) -> bool:
        raise error

    item = await testbed.claim_item()
    renewer = testbed.make_renewer()
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        monkeypatch.setattr(HeartbeatSender, "send_heartbeat", raise_error_instead_of_heartbeat)
        renewer.request_heartbeat(lease)
        await testbed.wait_until(lambda: testbed.failures and testbed.ended)
        assert testbed.ended == testbed.failures
        assert lease.status == "lost"


async def test_failure_of_renewer_is_reported_before_services_have_closed(
    testbed: LeaseRenewerTestbed,
) -> None:
    release = threading.Event()

    @contextlib.asynccontextmanager
    async def service_that_closes_slowly() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(release.wait, 20)

    async with testbed.make_renewer(service_that_closes_slowly()):
        testbed.fault = ZeroDivisionError("in the check")
        await testbed.wait_until(lambda: testbed.failures and testbed.ended)
        assert not release.is_set()
        release.set()


async def test_lag_of_blocked_event_loop_is_reported_to_observers(
    testbed: LeaseRenewerTestbed,
) -> None:
    async with testbed.make_renewer():
        await testbed.wait_until(
            lambda: [e for e in testbed.events if isinstance(e, LoopLagMeasured)]
        )
        time.sleep(0.3)  # noqa: ASYNC251 - blocking the loop is the point
        await testbed.wait_until(
            lambda: [
                e for e in testbed.events if isinstance(e, LoopLagMeasured) and e.seconds > 0.2
            ]
        )


async def test_blocked_loop_warning_names_the_handler(
    testbed: LeaseRenewerTestbed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(diagnostics, "LAG_WARNING_SECONDS", 0.1)

    async def blocking_handler() -> None:
        until = time.monotonic() + 20
        while "event loop is blocked" not in caplog.text and time.monotonic() < until:
            time.sleep(0.05)  # noqa: ASYNC251 - blocking the loop is the point

    async with testbed.make_renewer() as renewer, asyncio.TaskGroup() as group:
        group.create_task(blocking_handler(), name="reports.daily_report work_1")
        await testbed.wait_until(lambda: "event loop runs again" in caplog.text)
        assert renewer.renewing
    tasks = {vars(record).get("task") for record in caplog.records}
    assert "reports.daily_report work_1" in tasks


async def test_loop_blocked_too_long_suspends_lease_renewal_until_it_runs_again(
    testbed: LeaseRenewerTestbed, caplog: pytest.LogCaptureFixture
) -> None:
    item = await testbed.claim_item()
    renewer = testbed.make_renewer(max_block=0.3)
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        assert testbed.blocked.wait(10)  # This wait blocks the handlers' loop.
        assert not renewer.renewing
        assert testbed.ended == [None]
        assert "leases are not renewed anymore" in caplog.text
        # The warning has the stacks of all threads, including that of this test.
        assert "test_loop_blocked_too_long" in caplog.text
        await testbed.wait_until(lambda: renewer.renewing)
        assert lease.is_held(testbed.lease_clock())


async def test_no_heartbeat_is_sent_while_event_loop_is_blocked_too_long(
    testbed: LeaseRenewerTestbed,
) -> None:
    item = await testbed.claim_item()
    renewer = testbed.make_renewer(max_block=0.3)
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        assert testbed.blocked.wait(10)  # This wait blocks the handlers' loop.
        renewer.request_heartbeat(lease)
        # If renewal were not suspended, the renewer thread would send this heartbeat at once.
        time.sleep(5 * CHECK_SECONDS)  # noqa: ASYNC251 - blocking the loop is the point
        assert testbed.heartbeat_results() == ["ok"]
        await testbed.wait_for_heartbeats(2)


async def test_blocked_loop_report_states_seconds_since_last_ping_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The seconds come from a clock, and not from the time that the monitor adds up."""
    clock = ManualClock(100.0)
    monkeypatch.setattr(diagnostics, "time", SimpleNamespace(monotonic=clock))
    pings: list[Any] = []
    monitor = LoopMonitor(pings.append, max_block=1.5, interval=1)
    clock.advance(30)
    monitor.send_ping()
    clock.advance(0.5)
    answer_ping = pings.pop()
    answer_ping()
    clock.advance(2)
    monitor.send_ping()
    clock.advance(5)
    assert monitor.add_seconds_without_ping_answer(5.0)
    monitor.prepare_blocked_loop_report()()
    [record] = [each for each in caplog.records if each.message.startswith("event loop blocked")]
    assert vars(record)["seconds"] == 7


async def test_suspended_process_does_not_count_as_blocked_loop() -> None:
    pings: list[object] = []
    monitor = LoopMonitor(pings.append, max_block=5, interval=1)
    monitor.send_ping()
    assert not monitor.is_ping_answered
    assert not monitor.add_seconds_without_ping_answer(3_600.0)


class LogMessageWatcher(logging.Handler):
    """A log handler that sets an event when a message containing `text` is logged on any thread."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen = threading.Event()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.seen.set()


@pytest.fixture
def event_set_when_loop_stop_is_logged() -> Iterator[threading.Event]:
    """Return an event that is set when the renewer logs that the handlers' loop has stopped."""
    logged = LogMessageWatcher("the handlers' event loop does not run")
    log = logging.getLogger("workpool.pool.lease_renewer")
    log.addHandler(logged)
    yield logged.seen
    log.removeHandler(logged)


def test_stopped_loop_suspends_renewal_until_it_runs_again(
    event_set_when_loop_stop_is_logged: threading.Event,
) -> None:
    loop = asyncio.new_event_loop()

    async def start_renewer() -> tuple[LeaseRenewerTestbed, LeaseRenewer, Lease]:
        bench = LeaseRenewerTestbed()
        item = await bench.claim_item()
        renewer = await bench.make_renewer().__aenter__()
        [lease] = await bench.add_leases_and_wait_for_heartbeats(renewer, item)
        return bench, renewer, lease

    bench, renewer, lease = loop.run_until_complete(start_renewer())
    assert event_set_when_loop_stop_is_logged.wait(10)
    assert not renewer.renewing
    renewer.request_heartbeat(lease)
    # If renewal were not suspended, the renewer thread would send this heartbeat at once.
    time.sleep(5 * CHECK_SECONDS)
    assert bench.heartbeat_results() == ["ok"]

    async def wait_for_heartbeats_on_new_loop() -> None:
        await bench.wait_until(lambda: renewer.renewing)
        await bench.wait_for_heartbeats(2)
        await renewer.__aexit__()

    loop.run_until_complete(wait_for_heartbeats_on_new_loop())
    loop.close()


def test_closed_loop_ends_renewer_thread(
    event_set_when_loop_stop_is_logged: threading.Event,
) -> None:
    loop = asyncio.new_event_loop()

    async def start_renewer() -> LeaseRenewer:
        bench = LeaseRenewerTestbed()
        item = await bench.claim_item()
        renewer = await bench.make_renewer().__aenter__()
        await bench.add_leases_and_wait_for_heartbeats(renewer, item)
        return renewer

    renewer = loop.run_until_complete(start_renewer())
    (thread,) = renewer_threads()
    loop.close()
    assert event_set_when_loop_stop_is_logged.wait(10)
    thread.join(10)
    assert not thread.is_alive()
    assert not renewer.renewing


async def test_renewer_thread_ends_lease_before_deadline_although_heartbeat_hangs(
    testbed: LeaseRenewerTestbed,
) -> None:
    """Timers stood still while the machine slept, so no timeout ends the heartbeat."""
    item = await testbed.claim_item()
    renewer = testbed.make_renewer()
    async with renewer:
        [lease] = await testbed.add_leases_and_wait_for_heartbeats(renewer, item)
        testbed.sent.acquire()
        testbed.script = FaultScript(heartbeat=[Fault(answer="silence", applied=False)])
        renewer.request_heartbeat(lease)
        assert await asyncio.to_thread(testbed.sent.acquire, timeout=30)
        testbed.ahead += 53.5
        await testbed.wait_until(lambda: testbed.reported)
        assert lease.status == "lost"
        assert testbed.lease_clock() < lease.deadline
