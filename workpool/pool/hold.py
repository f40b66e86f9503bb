"""The child's side of a handover: a pool of one item, which a parent has acknowledged.

Nothing is polled. The first beat expects the parent's last one, so it takes the item only if the
parent has not taken it back; the rest is the pool's own: lease, handler, finish, drain.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from workpool.backoff import Backoff
from workpool.errors import ControlPlaneError, TransientError
from workpool.pool.dispatch import Dispatcher
from workpool.pool.handling import handler_group
from workpool.pool.poller import Polling
from workpool.pool.report import Running
from workpool.pool.supervisor import Supervisor
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

    from workpool.pool.calls import Calls
    from workpool.pool.parts import Parts
    from workpool.settings import Settings
    from workpool.wire.items import WorkItem

RETRY_SECONDS, RETRY_CAP_SECONDS = 0.2, 3.0


class Hold(Supervisor):
    """A supervisor that runs one item and ends with it.

    Args:
        settings: As a supervisor's; `lease_ttl` is what the beats ask for.
        work_id: The item.
        last_heartbeat: Of the parent, as `Session.handover` told it.
        plugins: Run it and watch it.
        registry: As a supervisor's.
        connect: Likewise.
    """

    def __init__(
        self,
        settings: Settings,
        work_id: str,
        last_heartbeat: str,
        *,
        plugins: Sequence[object] = (),
        registry: CollectorRegistry | None = None,
        connect: Callable[[Settings], Calls] = WorkClient,
    ) -> None:
        super().__init__(settings, plugins=plugins, registry=registry, connect=connect)
        self._work_id = work_id
        self._last_heartbeat = last_heartbeat

    async def _serve(self, parts: Parts) -> None:
        async with handler_group() as handlers, asyncio.TaskGroup() as working:
            dispatcher = Dispatcher(parts, working, handlers)
            end = functools.partial(self._drain.begin, self.settings.drain_timeout)
            polling = Polling(parts, until_empty=False, on_fatal=self._fail, on_empty=end)
            self._running = Running(parts, dispatcher, polling, [], self._drain)
            holding = working.create_task(self._hold(parts, dispatcher), name="hold")
            self._opened.set()
            await self._drain.requested.wait()
            holding.cancel()
            dispatcher.drain()
            self.left_behind = await self._drain.wind_down(parts, dispatcher)

    async def _hold(self, parts: Parts, dispatcher: Dispatcher) -> None:
        try:
            item = await self._find(parts)
        except ControlPlaneError as error:
            self._fail(error)
            return
        await dispatcher.adopt(item, self._last_heartbeat)
        await asyncio.wait(list(dispatcher.tasks))
        self._drain.begin(self.settings.drain_timeout)

    async def _find(self, parts: Parts) -> WorkItem:
        """Read the item, again while its parent may wait for our first beat."""
        backoff = Backoff(RETRY_SECONDS, RETRY_CAP_SECONDS)
        until = parts.clock() + self.settings.lease_ttl
        while True:
            try:
                return await parts.calls.get(self._work_id)
            except TransientError as error:
                delay = max(backoff.next(), error.retry_after or 0.0)
                if parts.clock() + delay >= until:
                    raise
            await asyncio.sleep(delay)
