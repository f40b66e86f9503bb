"""The lease renewer extends leases on a thread with its own event loop and connections.

A handler that blocks its event loop must not lose its lease. The renewer checks all leases at least
once a second, ends those whose time has passed and starts a short task for each heartbeat that is
due. It also monitors the handlers' loop and stops renewing once that has been blocked for
`max_block`. It decides about leases only. See workpool/docs/architecture.md, "Threads and loops"
and "Renewals".
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import sys
import threading
import time
from collections import deque
from contextvars import copy_context
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from workpool.errors import LeaseRenewerError, innermost
from workpool.events import LoopLagMeasured, current_work_id
from workpool.log_fields import pool_logger
from workpool.pool.call_permissions import OptionalCalls
from workpool.pool.diagnostics import LoopMonitor, log_on_new_thread
from workpool.pool.item_requests import HeartbeatSender
from workpool.pool.machine_pauses import PAUSE_SECONDS, MachinePauseDetector

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from contextlib import AbstractAsyncContextManager

    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.lease import Lease
    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.telemetry import EventReporter
    from workpool.settings import Settings

log = pool_logger(__name__)

CHECK_MAX_SECONDS = 1.0
"""Longest time in seconds between two checks of all leases, and the interval of pings."""
CHECK_MIN_SECONDS, CHECK_SECONDS_PER_LEASE = 0.02, 0.00005
"""Shortest time in seconds between two checks of all leases: a minimum, and a part per lease."""
CLOSE_SECONDS = 10.0
JOIN_SECONDS = 1.0
HEARTBEAT_LIMIT_MIN = 10
"""Smallest limit of heartbeats in flight."""
NEW_CONNECTIONS_PER_SECOND = 50
"""Growth of that limit per second while heartbeats wait: each may need a new connection."""
SHRINK_SECONDS = 30.0
"""Seconds without use after which a raised limit shrinks: its connections are closed by then."""


class RenewerCallbacks(NamedTuple):
    """The functions that the lease renewer calls to report changes and failures."""

    observe: EventReporter
    """Called with events on the renewer's thread."""
    changed: Callable[[PoolItem], None]
    """Called on the handlers' loop when the lease of an item has changed."""
    failed: Callable[[LeaseRenewerError], None]
    """Called on the handlers' loop when the thread has failed."""
    stopped_renewing: Callable[[LeaseRenewerError | None], None]
    """Called on the renewer's thread when leases are not renewed anymore."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Create an event loop: uvloop's, or asyncio's own on Windows."""
    if sys.platform != "win32":
        import uvloop  # noqa: PLC0415 - not installed on Windows

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


class LeaseRenewer:
    """Extends leases on a separate thread, which runs while this context manager is open.

    Args:
        settings: The settings of the pool.
        clock: The lease clock.
        wall: The wall clock, which shows that the machine was paused.
        connect: Creates the renewer's client, on the renewer's loop.
        callbacks: Called with its reports.
        services: Further contexts that live on the renewer's loop (the exporter).

    Attributes:
        client: The renewer's client; set once it has started.
        optional: Makes the calls that the credential may not permit.
        pauses: Detects that the machine was paused; used at every check of the leases.
        monitor: Measures how long the handlers' loop is blocked; set by `__aenter__`.
        renewing: False while the handlers' loop has been blocked for `max_block` or does not run,
            and once the thread has failed. Written on the renewer's thread.
    """

    check_seconds: ClassVar[float] = CHECK_MAX_SECONDS

    client: ClientProtocol
    monitor: LoopMonitor

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        wall: Clock,
        connect: Callable[[], ClientProtocol],
        callbacks: RenewerCallbacks,
        services: Sequence[AbstractAsyncContextManager[object]] = (),
    ) -> None:
        self.optional = OptionalCalls()
        self.clock = clock
        self.request_timeout = settings.request_timeout
        self.renewing = True
        self._max_block = settings.max_block
        self._connect = connect
        self._callbacks = callbacks
        self._services = services
        self.pauses = MachinePauseDetector(clock, wall)
        # Changed on the handlers' loop, copied on the renewer's. Each change and copy is atomic.
        self._leases: dict[Lease, PoolItem] = {}
        # Only the handlers' loop writes `_started` and `_closing`.
        self._started = self._closing = False
        # Only the renewer's thread writes `_error`.
        self._error: LeaseRenewerError | None = None

        # The following attributes are used on the renewer's loop only.
        self._crash: BaseException | None = None
        self._stop = asyncio.Event()
        self._check_now = asyncio.Event()
        self._next_check_at = math.inf
        self._lag_measured_at = (-math.inf, -math.inf)
        self._tasks: set[asyncio.Task[None]] = set()
        self._due_leases: deque[Lease] = deque()
        self._in_flight_count = self._peak = 0
        self._heartbeat_limit = float(HEARTBEAT_LIMIT_MIN)
        self._limit_adjusted_at = self._peak_since = clock()

    # The following methods are called on the handlers' loop.

    async def __aenter__(self) -> LeaseRenewer:
        self._handlers_loop = asyncio.get_running_loop()
        self.monitor = LoopMonitor(self._call_on_handlers_loop, self._max_block, self.check_seconds)
        self._opened = asyncio.Event()
        self._thread_ended = self._start_thread()
        self._thread_ended.add_done_callback(self._on_thread_ended)
        try:
            await self._opened.wait()
            if self._thread_ended.done():
                await self._thread_ended  # If an error has ended the thread, raise it here.
            self._started = True
        except BaseException:
            await self._close_thread()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close_thread()

    def add_lease(self, lease: Lease, item: PoolItem) -> None:
        """Begin to extend a lease whose first heartbeat has succeeded.

        Wakes the thread only if the next heartbeat is due before the next check of all leases.
        """
        if not lease.is_over:
            self._leases[lease] = item
            if self._error is not None:
                lease.end_lease("lost")
            # If the answer to the first heartbeat was slow, the second heartbeat is due before the
            # next check of all leases: wake the renewer's thread.
            elif lease.due_at < self._next_check_at:
                self._schedule_on_renewer_loop(self._check_now.set)

    def remove_lease(self, lease: Lease) -> None:
        """Do not extend `lease` anymore, because its session has ended.

        Does not wake the thread.
        """
        lease.closed = True
        item = self._leases.pop(lease, None)
        if item is not None and item.handoff is not None:
            # The task that hands the item off waits for answers to heartbeats. Wake this task,
            # because no heartbeat follows anymore.
            self.call_on_renewer_loop(item.handoff.wake_handoff_task)

    def request_heartbeat(self, lease: Lease) -> None:
        """Make the renewer send a heartbeat now for a lease that may be lost."""
        self.call_on_renewer_loop(
            lambda: self._send_unscheduled_heartbeat(lease, lease.make_heartbeat_due)
        )

    def request_lease_check(self) -> None:
        """Make the renewer check all leases now, because the machine was paused."""
        self.call_on_renewer_loop(self._check_now.set)

    def request_last_heartbeat(self, lease: Lease, delay: float) -> None:
        """Release an item: one last heartbeat makes its lease end after `delay` seconds."""
        self.call_on_renewer_loop(
            lambda: self._send_unscheduled_heartbeat(
                lease, functools.partial(lease.schedule_last_heartbeat, delay=delay)
            )
        )

    def start_handoff_task(
        self, work: Callable[[], Coroutine[object, object, None]], name: str
    ) -> None:
        """Run the coroutine of a handoff in a task on the renewer's loop."""
        self.call_on_renewer_loop(lambda: self._group.create_task(work(), name=name))

    def call_on_renewer_loop(self, callback: Callable[[], object]) -> None:
        """Schedule a callback on the renewer's loop."""
        self._schedule_on_renewer_loop(self._run_submitted_callback, callback)

    def held_leases(self) -> list[Lease]:
        """The leases that are held now. May be called on any thread."""
        return [lease for lease in list(self._leases) if not lease.is_over]

    async def _close_thread(self) -> None:
        self._closing = True
        self._schedule_on_renewer_loop(self._stop.set)
        done, _ = await asyncio.wait({self._thread_ended}, timeout=CLOSE_SECONDS)
        if done:
            self._join_thread()
        else:
            log.critical("lease renewer did not end; abandoned", extra={"seconds": CLOSE_SECONDS})

    def _start_thread(self) -> asyncio.Future[None]:
        """Start the renewer's thread, and return a future that is done when its loop has ended.

        The thread is a daemon, so that a blocked one does not prevent the end of the process.
        """
        self._loop = new_event_loop()
        ended = self._handlers_loop.create_future()
        self._thread = threading.Thread(
            # Copy this thread's context: without it, the log records would lack the pool's ids.
            target=copy_context().run,
            args=(self._thread_main, ended),
            name="workpool-lease-renewer",
            daemon=True,
        )
        self._thread.start()
        return ended

    def _join_thread(self) -> None:
        # The renewer's loop has ended, so its thread returns at once, and the join does not block
        # the handlers' loop.
        self._thread.join(JOIN_SECONDS)

    def _schedule_on_renewer_loop(self, callback: Callable[..., object], *args: object) -> None:
        # If the renewer's loop is closed, there is nothing left to call.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _on_thread_ended(self, ended: asyncio.Future[None]) -> None:
        self._opened.set()
        cause = None if ended.cancelled() else ended.exception()
        if not self._started:
            return  # `__aenter__` raises the error of a thread that has failed to start.
        if self._closing:
            if cause is not None:
                log.error("lease renewer did not close cleanly", exc_info=cause)
            return
        self._fail_pool(cause or RuntimeError("ended without an error"))

    def _end_leases(self) -> None:
        """End all leases as lost, because the lease renewer has failed.

        This loop may write the leases, since the renewer's thread does not use them anymore.
        """
        for lease, item in list(self._leases.items()):
            lease.end_lease("lost")
            self._callbacks.changed(item)
        if self._error is not None:
            self._callbacks.failed(self._error)

    # The following methods are called on the renewer's thread.

    def _thread_main(self, ended: asyncio.Future[None]) -> None:
        error: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                try:
                    runner.run(self._renew_until_stopped())
                except BaseException as failure:
                    # Report the failure before the runner is closed, which may take long.
                    self._fail_pool(failure)
                    raise
        except BaseException as failure:  # noqa: BLE001 - passed on to the handlers' loop
            error = failure
        self._call_on_handlers_loop(functools.partial(_set_result_or_error, ended, error))

    def _send_unscheduled_heartbeat(self, lease: Lease, plan: Callable[[float], None]) -> None:
        if lease in self._leases and not lease.is_over:
            plan(self.clock())
            self._due_leases.appendleft(lease)
            self._start_due_heartbeats()

    def _run_submitted_callback(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as error:
            self._crash = error
            self._stop.set()
            raise

    def _fail_pool(self, cause: BaseException) -> None:
        """End the pool because of an exception on this thread. Only the first call counts."""
        if self._record_renewer_failure(cause):
            self._stop_renewing(
                functools.partial(log.critical, "leases are not renewed anymore", exc_info=cause)
            )

    def _record_renewer_failure(self, cause: BaseException) -> bool:
        """Record that the renewer has failed, and end all leases and the pool.

        Returns:
            False if the pool has failed or is closing already, so that this call has no effect.
        """
        if self._error is not None or self._closing or not self._started:
            return False
        self._error = LeaseRenewerError("the thread that renews the leases failed")
        self._error.__cause__ = cause
        self._call_on_handlers_loop(self._end_leases)
        return True

    def _stop_renewing(self, write_report: Callable[[], None]) -> None:
        """Stop renewing, call `write_report`, and, even after an error, call `stopped_renewing`."""
        self.renewing = False
        try:
            log_on_new_thread(write_report)
        except BaseException as error:
            # End the leases before `stopped_renewing` is called. That callback may let a blocked
            # handler continue, and the handler must not use its lease anymore.
            self._record_renewer_failure(error)
            raise
        finally:
            self._callbacks.stopped_renewing(self._error)

    async def _renew_until_stopped(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self.client = self._connect()
            await stack.enter_async_context(self.client)
            self._heartbeats = HeartbeatSender(
                self.client, self.clock, self.pauses, self._callbacks.observe, self.optional
            )
            for service in self._services:
                await stack.enter_async_context(service)
            try:
                async with asyncio.TaskGroup() as group:
                    await self._renew_leases(group)
            except BaseExceptionGroup as errors:
                # Report the failure before the exporter and the client close, which may take long.
                self._fail_pool(innermost(errors))
                raise

    async def _renew_leases(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        checks = group.create_task(self._check_leases_repeatedly(), name="lease-renewer-checks")
        self._call_on_handlers_loop(self._opened.set)
        await self._stop.wait()
        if self._crash is not None:
            raise self._crash
        checks.cancel()
        for task in list(self._tasks):
            task.cancel()

    def _call_on_handlers_loop(self, callback: Callable[[], object]) -> None:
        """Schedule a callback on the handlers' loop."""
        # If the handlers' loop is closed, the call is not needed anymore.
        with contextlib.suppress(RuntimeError):
            self._handlers_loop.call_soon_threadsafe(callback)

    def report_lease_change(self, item: PoolItem) -> None:
        """Report to the handlers' loop that the lease of an item has changed."""
        self._call_on_handlers_loop(functools.partial(self._callbacks.changed, item))

    def send_handoff_heartbeat(self, lease: Lease) -> None:
        """Send a heartbeat for a handoff, unless one is in flight."""
        if not lease.in_flight:
            self._send_unscheduled_heartbeat(lease, lease.resume_heartbeats)

    async def _check_leases_repeatedly(self) -> None:
        while True:
            self._measure_handlers_loop_lag()
            self._next_check_at = self._end_or_renew_leases()
            await asyncio.sleep(CHECK_MIN_SECONDS + len(self._leases) * CHECK_SECONDS_PER_LEASE)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._next_check_at - self.clock()):
                    await self._check_now.wait()
            self._check_now.clear()

    def _end_or_renew_leases(self) -> float:
        """End expired leases, start due heartbeats; return when the next check must be made."""
        # Copy the keys only: that is one atomic step, although the other thread adds and removes
        # leases. Copying `items()` is not atomic: each new tuple may start a garbage collection.
        leases, now = list(self._leases), self.clock()
        self._verify_leases_after_pause(leases, now)
        due, next_at = self._find_due_leases(leases, now)
        self._adjust_concurrent_heartbeat_limit(now, waiting=bool(self._due_leases))
        due.sort(key=_lease_deadline)
        self._due_leases = deque(due)
        self._start_due_heartbeats()
        return next_at

    def _verify_leases_after_pause(self, leases: list[Lease], now: float) -> None:
        """Make heartbeats due for the leases that were last extended before a machine pause."""
        offset = self.pauses.wall_clock_offset()
        to_verify = 0
        for lease in leases:
            if abs(offset - lease.clock_offset) >= PAUSE_SECONDS:
                to_verify += lease.request_verification_after_pause(now)
        if to_verify:
            log.warning(
                "the machine was paused; its leases are verified first", extra={"count": to_verify}
            )

    def _find_due_leases(self, leases: list[Lease], now: float) -> tuple[list[Lease], float]:
        """End expired leases; return the leases with a due heartbeat, and the next check's time.

        The time is at most `check_seconds` away. The loop makes no call for a lease that is not
        due: with 10,000 leases a check took 5.1 ms with calls, and takes 0.7 ms without.
        """
        due: list[Lease] = []
        next_at = now + self.check_seconds
        for lease in leases:
            if now >= lease.give_up_at and lease.status == "held":
                lease.end_if_expired(now)
                self._report_lost_lease(lease)
                continue
            at = lease.give_up_at
            if lease.due_at <= now:
                due.append(lease)
            elif lease.due_at < at:
                at = lease.due_at
            next_at = at if at < next_at else next_at
        return due, next_at

    def _adjust_concurrent_heartbeat_limit(self, now: float, *, waiting: bool) -> None:
        """Raise the limit of concurrent heartbeats while more heartbeats are due than allowed.

        While no heartbeat waits, every `SHRINK_SECONDS` lower the limit to the largest number used.
        """
        if waiting:
            seconds = min(1.0, now - self._limit_adjusted_at)
            self._heartbeat_limit += NEW_CONNECTIONS_PER_SECOND * seconds
        elif now - self._peak_since >= SHRINK_SECONDS:
            self._heartbeat_limit = float(max(HEARTBEAT_LIMIT_MIN, self._peak))
            self._peak, self._peak_since = self._in_flight_count, now
        self._limit_adjusted_at = now

    def _start_due_heartbeats(self) -> None:
        """Start heartbeats that are due, the earliest deadline first, within the limit."""
        while self._due_leases and self._in_flight_count < self._heartbeat_limit and self.renewing:
            lease = self._due_leases.popleft()
            item = self._leases.get(lease)
            if item is None or lease.in_flight or lease.is_over:
                continue
            if lease.due_at <= self.clock():
                self._start_heartbeat(lease, item)

    def _start_heartbeat(self, lease: Lease, item: PoolItem) -> None:
        lease.in_flight = True
        self._in_flight_count += 1
        self._peak = max(self._peak, self._in_flight_count)
        task = self._group.create_task(self._renew_lease(lease, item), name=lease.item.id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew_lease(self, lease: Lease, item: PoolItem) -> None:
        """Send the heartbeat that is due, and the one that must follow at once, if any."""
        current_work_id.set(item.id)
        try:
            await self._send_heartbeat(lease, item)
            while lease.due_at <= self.clock() and not lease.end_if_expired(self.clock()):
                await self._send_heartbeat(lease, item)
        finally:
            self._in_flight_count -= 1
            if item.handoff is not None:
                item.handoff.wake_handoff_task()
            if lease.due_at < self._next_check_at:
                self._check_now.set()
            self._start_due_heartbeats()

    async def _send_heartbeat(self, lease: Lease, item: PoolItem) -> None:
        before = lease.status, lease.stop_requested
        was_machine_paused = self.pauses.was_machine_paused(since=lease.clock_offset)
        await self._heartbeats.send_heartbeat(lease)
        lease.end_if_expired(self.clock())
        if was_machine_paused or (lease.status, lease.stop_requested) != before:
            self.report_lease_change(item)
        # The machine was paused during this heartbeat, so the answer does not prove that the lease
        # is still held.
        if self.pauses.was_machine_paused(since=lease.clock_offset):
            lease.request_verification_after_pause(self.clock())

    def _report_lost_lease(self, lease: Lease) -> None:
        item = self._leases.get(lease)
        if item is None:  # The session has ended since the check began, so nobody uses the lease.
            return
        self.report_lease_change(item)
        if item.handoff is not None:
            item.handoff.wake_handoff_task()

    def _measure_handlers_loop_lag(self) -> None:
        """Measure, once per `check_seconds`, how late the handlers' loop is."""
        loop = asyncio.get_running_loop()
        times = loop.time(), time.monotonic()
        # Measure the time with two clocks and use the longer one: the loop's own clock lags behind
        # while the loop is busy, and `time.monotonic` stands still in simulated time.
        seconds = max(now - then for now, then in zip(times, self._lag_measured_at, strict=True))
        if seconds < self.check_seconds:
            return
        self._lag_measured_at = times
        if not self._handlers_loop.is_running():
            self._end_renewals_without_handlers_loop()
        elif self.monitor.is_ping_answered:
            if self.monitor.lag is not None:
                self._callbacks.observe(LoopLagMeasured, self.monitor.lag)
            self.renewing = True
            self.monitor.send_ping()
        elif self.monitor.add_seconds_without_ping_answer(seconds) and self.renewing:
            self._stop_renewing(self.monitor.prepare_blocked_loop_report())

    def _end_renewals_without_handlers_loop(self) -> None:
        """Renew no lease anymore, because the handlers' loop was stopped or closed."""
        renewing, self.renewing = self.renewing, False
        if renewing:
            log.critical("the handlers' event loop does not run; leases are not renewed")
        if self._handlers_loop.is_closed():
            self._stop.set()


def _lease_deadline(lease: Lease) -> float:
    return lease.deadline


def _set_result_or_error(future: asyncio.Future[None], error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
