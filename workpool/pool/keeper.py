"""The keeper: a thread with an event loop and connections of its own, on which leases are kept.

A handler that blocks the supervisor's loop must not lose its lease (design §1, Lease before work).
The keeper also watches that loop: it measures its lag, names the handler that blocks it, and stops
renewing after `max_block`. An exception on the thread stops renewing too, and is fatal to the pool.
It never decides anything about an item beyond its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from workpool.errors import KeeperError, innermost
from workpool.events import LoopLagMeasured
from workpool.pool.diagnostics import report
from workpool.pool.loop_monitor import TICK_SECONDS, LoopMonitor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from workpool.events import Event
    from workpool.pool.calls import Calls
    from workpool.pool.clock import Clock
    from workpool.pool.lease import Lease
    from workpool.settings import Settings

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
SLEEP_SECONDS = 0.5
"""A lease clock that gained this much on one that sleeps, during one tick: the machine slept."""


class Watcher(NamedTuple):
    """Whom the keeper reports to."""

    observe: Callable[[Event], None]
    """Told of facts, on the keeper's thread."""
    died: Callable[[KeeperError], None]
    """The thread failed. Called on the handlers' loop."""
    renewal_ended: Callable[[KeeperError | None], None]
    """Leases are not renewed any more, because of the error, or of a loop blocked for `max_block`.

    Called on the keeper's thread.
    """


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where there is one: the thread is ours, so the choice is too."""
    if sys.platform != "win32":
        import uvloop  # noqa: PLC0415 - not installed on Windows

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


class Keeper:
    """Keeps leases, from `__aenter__` to `__aexit__`, on a thread of its own.

    Attributes:
        renewing: False while the handlers' loop has been blocked for `max_block`, and once the
            thread has failed. Written on the keeper's thread.
        tick_seconds: How often it looks after the handlers' loop and the machine's sleep.
    """

    tick_seconds: ClassVar[float] = TICK_SECONDS

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        calls: Calls,
        watcher: Watcher,
        services: Sequence[AbstractAsyncContextManager[object]] = (),
    ) -> None:
        """`services`: more contexts to live on the keeper's loop (the exporter)."""
        self.clock = clock
        self.calls = calls
        self.lease_ttl = settings.lease_ttl
        self.request_timeout = settings.request_timeout
        self.observe = watcher.observe
        self.renewing = True
        self._max_block = settings.max_block
        self._watcher = watcher
        self._services = services
        # Added to on the handlers' loop, swept on the keeper's; single steps of both are atomic.
        self._leases: dict[Lease, None] = {}
        self._ended: deque[Lease] = deque()
        self._stop = asyncio.Event()  # waited for and set on the keeper's loop
        self._serving = self._closing = False  # written on the handlers' loop
        self._error: KeeperError | None = None  # written on the keeper's thread
        self._crash: BaseException | None = None  # used on the keeper's loop only

    # Called on the handlers' loop.

    async def __aenter__(self) -> Keeper:
        self._handlers_loop = asyncio.get_running_loop()
        self._monitor = LoopMonitor(self.tell, self._max_block)
        self._opened = asyncio.Event()
        self._thread = self._start_thread()
        self._thread.add_done_callback(self._thread_ended)
        try:
            await self._opened.wait()
            if self._thread.done():
                await self._thread  # raises what ended it
            self._serving = True
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    def watch(self, lease: Lease) -> None:
        """Look after `lease` from the next tick on. Costs no wake-up, so short sessions need none.

        Its first beat is the handlers' loop's to send, unless that is blocked meanwhile.
        """
        self._leases[lease] = None
        if self._error is not None:
            lease.abandon()

    def hold(self, lease: Lease) -> None:
        """Begin to beat for `lease` now."""
        self.watch(lease)
        self._call(self._adopt, lease)

    def beat_now(self, lease: Lease) -> None:
        """Check a lease that there is reason to doubt."""
        self.prompt(lease, lease.beat_now)

    def release(self, lease: Lease, delay: float) -> None:
        """Let `lease` lapse `delay` seconds from now: one last beat, then silence."""
        self.prompt(lease, functools.partial(lease.release, delay))

    def prompt(self, lease: Lease, call: Callable[[], None]) -> None:
        """Run a call of the lease's, or of its handover's, on the keeper's loop."""
        self._call(self._prompt, lease, call)

    def end(self, lease: Lease) -> None:
        """Nobody needs `lease` any more. Costs no wake-up: the next one sweeps it out."""
        lease.ended = True
        lease.on_change = _ignore  # it knew the claim, which knows the lease
        self._ended.append(lease)

    def leases(self) -> list[Lease]:
        """Those held now. May be called on any thread."""
        return [lease for lease in list(self._leases) if not lease.ended and lease.fate == "held"]

    async def _close(self) -> None:
        self._closing = True
        self._call(self._stop.set)
        try:
            done, _ = await asyncio.wait({self._thread}, timeout=CLOSE_SECONDS)
            if not done:
                log.critical("keeper did not end seconds=%.0f; left behind", CLOSE_SECONDS)
        finally:
            self._join_thread()

    def _start_thread(self) -> asyncio.Future[None]:
        """Start to run `_main` on `_loop`; done when it has ended. A simulation does without."""
        self._loop = new_event_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="workpool-keeper")
        return self._handlers_loop.run_in_executor(self._executor, self._run)

    def _join_thread(self) -> None:
        self._executor.shutdown(wait=self._thread.done())

    def _call(self, callback: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: the keeper is gone
            self._loop.call_soon_threadsafe(self._run_call, callback, *args)

    def _thread_ended(self, thread: asyncio.Future[None]) -> None:
        self._opened.set()
        cause = None if thread.cancelled() else thread.exception()
        if not self._serving:
            return  # never began: `__aenter__` raises why
        if self._closing:
            if cause is not None:
                log.error("keeper did not close cleanly", exc_info=cause)
            return
        self._fail(cause or RuntimeError("ended without an error"))

    def _died(self) -> None:
        for lease in list(self._leases):
            lease.abandon()
        if self._error is not None:
            self._watcher.died(self._error)

    # Called on the keeper's thread.

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._main())
            except BaseException as error:
                self._fail(error)  # closing the runner may take long
                raise

    def _run_call(self, callback: Callable[..., object], *args: object) -> None:
        try:
            callback(*args)
        except BaseException as error:
            self._crash = error
            self._stop.set()
            raise

    def _fail(self, cause: BaseException) -> None:
        """End the pool because of an exception on this thread. Only the first call counts."""
        if self._error is not None or self._closing or not self._serving:
            return
        self._error = KeeperError("the thread that keeps the leases failed")
        self._error.__cause__ = cause
        self._stop.set()  # a lease that comes now must not be adopted by a group that has ended
        self.tell(self._died)
        self._stop_renewing(
            functools.partial(log.critical, "leases are not renewed any more", exc_info=cause)
        )

    def _stop_renewing(self, write_report: Callable[[], None]) -> None:
        """Renew no lease any more; then report, which must not prevent the end of the process."""
        self.renewing = False
        try:
            report(write_report)
        finally:
            self._watcher.renewal_ended(self._error)

    async def _main(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.calls)
            for service in self._services:
                await stack.enter_async_context(service)
            try:
                async with asyncio.TaskGroup() as group:
                    await self._renew(group)
            except BaseExceptionGroup as errors:
                self._fail(innermost(errors))  # closing the services may take long
                raise

    async def _renew(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        ticker = group.create_task(self._tick(), name="keeper-tick")
        self.tell(self._opened.set)
        await self._stop.wait()
        if self._crash is not None:
            raise self._crash
        ticker.cancel()
        for lease in list(self._leases):
            if lease.task is not None:
                lease.task.cancel()

    def tell(self, callback: Callable[[], object]) -> None:
        """Run `callback` on the handlers' loop."""
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody is left to be told
            self._handlers_loop.call_soon_threadsafe(callback)

    def _adopt(self, lease: Lease) -> None:
        self._sweep()
        if lease.task is None and not (lease.ended or self._stop.is_set()):
            lease.task = self._group.create_task(lease.keep(), name=lease.item.id)

    def _prompt(self, lease: Lease, call: Callable[[], None]) -> None:
        self._adopt(lease)
        call()

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        # Two clocks that stop while the machine sleeps: a busy uvloop's own one lags behind, which
        # must not look like sleep, and a virtual loop's is the only one that moves.
        lease_time, clocks = self.clock(), (loop.time(), time.monotonic())
        while True:
            await asyncio.sleep(self.tick_seconds)
            lease_before, before = lease_time, clocks
            lease_time, clocks = self.clock(), (loop.time(), time.monotonic())
            seconds = max(clocks[0] - before[0], clocks[1] - before[1])
            self._sweep()
            self._look_after(slept=lease_time - lease_before - seconds > SLEEP_SECONDS)
            self._watch(seconds)

    def _sweep(self) -> None:
        while self._ended:
            lease = self._ended.popleft()
            self._leases.pop(lease, None)
            if lease.task is not None:
                lease.task.cancel()
                lease.task = None  # it knew the lease

    def _look_after(self, *, slept: bool) -> None:
        """Give up every lease whose time to has come, and adopt those that have begun.

        Timers stand still while the machine sleeps, so what is still held then is renewed at once.
        """
        now = self.clock()  # read once: there may be ten thousand leases, every second
        for lease in list(self._leases):
            if now >= lease.give_up_at:
                lease.expire()
            if lease.fate != "held":
                if lease.task is not None:
                    lease.task.cancel()
                continue
            blocked = self._monitor.blocked
            if lease.task is None and (lease.begun or (blocked and lease.take_over())):
                self._adopt(lease)
            if slept:
                lease.beat_now()

    def _watch(self, seconds: float) -> None:
        """Measure how late the handlers' loop is. `seconds`: since the last look."""
        monitor = self._monitor
        if monitor.answered:
            if monitor.lag is not None:
                self.observe(LoopLagMeasured(monitor.lag))
            self.renewing = True
            monitor.ask()
        elif monitor.wait(seconds) and self.renewing:
            self._stop_renewing(monitor.blocked_report())


def _ignore() -> None:
    """Takes the place of a callback that would keep its owner alive."""
