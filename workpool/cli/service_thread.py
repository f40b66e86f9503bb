"""A thread with an event loop of its own for what must answer while a handler blocks the others.

One environment has its exporter on the thread of its lease renewer. Of several environments each
may end before the others, and their exporter must not end with one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Final, Self

from workpool.cli.log_config import log
from workpool.pool.lease_renewer import new_event_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

CLOSE_SECONDS: Final = 10.0


class ServiceThread:
    """An async context manager that keeps other ones open on a thread of its own.

    The thread is a daemon, so that a service that does not close cannot prevent the end of the
    process.

    Args:
        services: The contexts, entered and left on the thread.
    """

    def __init__(self, services: Sequence[AbstractAsyncContextManager[object]]) -> None:
        self._services = services
        self._loop = new_event_loop()
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Enter the services.

        Raises:
            WorkpoolError: One of them cannot be opened, such as the exporter.
        """
        self._owner = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._owner.create_future()
        self._ended = asyncio.Event()
        threading.Thread(target=self._run, name="workpool-services", daemon=True).start()
        try:
            await self._opened
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed, so the thread has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            log.critical("services did not close; abandoned", extra={"seconds": CLOSE_SECONDS})

    # On the thread.

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - passed on to the owner, or logged
            self._tell(self._failed, error)
        finally:
            self._tell(self._ended.set)

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for service in self._services:
                await stack.enter_async_context(service)
            self._tell(self._open)
            await self._stop.wait()

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """Run a callback on the owner's loop."""
        with contextlib.suppress(RuntimeError):  # that loop is closed
            self._owner.call_soon_threadsafe(callback, *arguments)

    # On the owner's loop.

    def _open(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    def _failed(self, error: BaseException) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)
        elif not self._opened.cancelled():
            log.critical("services failed", exc_info=error)
