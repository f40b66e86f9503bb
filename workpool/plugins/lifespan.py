"""A plugin's `workpool_lifespan` context, entered and left in the supervisor's root task.

An error on entering names the plugin. A context that does not close within `CLOSE_SECONDS` is
abandoned, so that it cannot keep the others open.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from workpool.errors import PluginError
from workpool.log_fields import pool_logger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

log = pool_logger(__name__)

CLOSE_SECONDS = 10.0


class PluginLifespan:
    """Wraps the context manager that a plugin's `workpool_lifespan` returned.

    Leaving the context may take at most `CLOSE_SECONDS`; entering it has no time limit.
    """

    def __init__(self, plugin: str, context: AbstractAsyncContextManager[object]) -> None:
        self._plugin = plugin
        self._context = context

    async def __aenter__(self) -> None:
        """Enter the context; an error stops the start of the pool."""
        try:
            with self._plugin_cancellation_as_error():
                await self._context.__aenter__()
        except BaseException as error:
            error.add_note(f"while entering workpool_lifespan of plugin {self._plugin!r}")
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the context within `CLOSE_SECONDS`.

        An error of the pool is raised in any case: the context's return value is ignored.
        """
        try:
            async with asyncio.timeout(CLOSE_SECONDS) as scope:
                with self._plugin_cancellation_as_error():
                    await self._context.__aexit__(kind, error, trace)
        except TimeoutError:
            if not scope.expired():
                raise
            log.exception("plugin did not close", extra={"plugin": self._plugin})

    @contextlib.contextmanager
    def _plugin_cancellation_as_error(self) -> Iterator[None]:
        """Raise a PluginError if the plugin raises CancelledError and nobody cancelled this task.

        Otherwise the CancelledError would look like a cancellation of the pool by the embedder.
        """
        task = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError as error:
            if task is None or task.cancelling():
                raise
            raise PluginError(
                self._plugin, "its workpool_lifespan leaked a CancelledError"
            ) from error
