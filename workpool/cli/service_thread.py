"""A thread with its own event loop, for services such as the exporter.

These services answer even while a handler blocks the event loop of the pool.

A process for one environment runs its exporter on the thread of the lease renewer. In a process for
several environments, each environment may end before the others, and the exporter must not end with
it. So the exporter has a thread of its own there.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Self

from workpool.cli.log_config import log
from workpool.pool.lease_renewer import new_event_loop
from workpool.wire.http.daemon_threads import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

CLOSE_SECONDS: Final = 10.0


class ServiceThread:
    """An async context manager that keeps other contexts open on a thread of its own.

    The thread is a daemon, so that a service that does not close cannot prevent the end of the
    process.

    Args:
        services: The contexts, entered and left on the thread.
    """

    def __init__(self, services: Sequence[AbstractAsyncContextManager[object]]) -> None:
        self._services = services
        self._threads = DaemonThreads("workpool-services", 1)
        self._loop = new_event_loop()
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Start the thread, and enter the services there.

        Raises:
            WorkpoolError: A service cannot be opened, such as the exporter.
        """
        self._owner = asyncio.get_running_loop()
        self._opened = asyncio.Event()
        self._thread = asyncio.wrap_future(self._threads.submit(self._run_loop))
        self._thread.add_done_callback(self._report_thread_end)
        try:
            await self._opened.wait()
            if self._thread.done():
                await self._thread  # Raise the error of the service that failed to open.
        except BaseException:
            await self._close_services()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close_services()

    async def _close_services(self) -> None:
        # The loop refuses the callback if the thread has ended: then there is nothing to stop.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        done, _ = await asyncio.wait({self._thread}, timeout=CLOSE_SECONDS)
        if done:
            await self._threads.close()
        else:
            log.critical("services did not close; abandoned", extra={"seconds": CLOSE_SECONDS})

    def _report_thread_end(self, thread: asyncio.Future[None]) -> None:
        error = None if thread.cancelled() else thread.exception()
        # An error before the services have opened is raised by `__aenter__` and not logged here.
        if error is not None and self._opened.is_set():
            log.critical("services failed", exc_info=error)
        self._opened.set()

    def _run_loop(self) -> None:
        """Run the services on the event loop of the thread. Called on the thread."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._keep_services_open())

    async def _keep_services_open(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for service in self._services:
                await stack.enter_async_context(service)
            # A RuntimeError means that the loop `_owner` is closed. Then no task waits for
            # `_opened`, so ignore the error.
            with contextlib.suppress(RuntimeError):
                self._owner.call_soon_threadsafe(self._opened.set)
            await self._stop.wait()
