"""The child's side of a handoff: a pool that runs one item, which its parent has acknowledged.

The pool does not poll. The first heartbeat expects the parent's last one, so it takes the item only
if the parent has not taken it back. Lease, handler, completion and drain are as in any pool. See
workpool/docs/architecture.md, "Handing an item off".
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError, RefusedError, TransientError
from workpool.pool.call_permissions import read_or_find_item
from workpool.pool.dispatcher import Dispatcher
from workpool.pool.handler_executor import open_handler_task_group
from workpool.pool.item_requests import make_request_backoff
from workpool.pool.poller import PollerGroup
from workpool.pool.status import PoolView
from workpool.pool.supervisor import Supervisor
from workpool.wire.client import WorkClient
from workpool.wire.items import parse_item
from workpool.wire.protocol import ACTIVE, SESSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.pool_context import PoolContext
    from workpool.settings import Settings
    from workpool.wire.items import WorkItem


class HandoffChildSupervisor(Supervisor):
    """The supervisor of a child process: runs the one item that a parent handed off to it.

    Args:
        settings: The settings, as for a supervisor; heartbeats request `lease_ttl`.
        work_id: The id of the item.
        last_heartbeat: The parent's last heartbeat, from `Session.handover`.
        plugins: The plugins that run and observe the item.
        registry: The registry, as for a supervisor.
        connect: The function that creates clients, as for a supervisor.
        session_id: The id of the item's session if the item is not read, since its own token may
            not read it.
    """

    def __init__(  # noqa: PLR0913 - a supervisor's, and what a parent passes on
        self,
        settings: Settings,
        work_id: str,
        last_heartbeat: str,
        *,
        plugins: Sequence[object] = (),
        registry: CollectorRegistry | None = None,
        connect: Callable[[Settings], ClientProtocol] = WorkClient,
        session_id: str | None = None,
    ) -> None:
        super().__init__(settings, plugins=plugins, registry=registry, connect=connect)
        self._session_id = session_id
        self._work_id = work_id
        self._last_heartbeat = last_heartbeat

    async def _run_pool(self, context: PoolContext) -> None:
        async with open_handler_task_group() as handlers, asyncio.TaskGroup() as working:
            end = functools.partial(self._drain.request, self.settings.drain_timeout)
            group = PollerGroup(
                context, until_empty=False, on_fatal=self._drain_after_error, on_empty=end
            )
            dispatcher = Dispatcher(context, working, handlers, group.record_ack_result)
            self._view = PoolView(context, dispatcher, group, [], self._drain)
            holding = working.create_task(self._run_item(context, dispatcher), name="hold")
            self._opened.set()
            await self._drain.requested.wait()
            holding.cancel()
            dispatcher.begin_drain()
            self.abandoned = await self._drain.finish_sessions(context, dispatcher)

    async def _run_item(self, context: PoolContext, dispatcher: Dispatcher) -> None:
        ended = asyncio.Event()
        dispatcher.on_closed = ended.set
        try:
            item = await self._find_item(context)
        except ControlPlaneError as error:
            self._drain_after_error(error)
            return
        await dispatcher.adopt_handed_off_item(item, self._last_heartbeat)
        await ended.wait()
        self._drain.request(self.settings.drain_timeout)

    async def _find_item(self, context: PoolContext) -> WorkItem:
        """Read the item, with retries as long as the parent may still wait for the child."""
        if self._session_id is not None:
            return _build_item(self._work_id, self._session_id, str(self.settings.environment_id))
        backoff = make_request_backoff()
        until = context.clock() + self.settings.lease_ttl
        client, optional, seconds = context.client, context.optional, self.settings.request_timeout
        while True:
            try:
                item = await read_or_find_item(client, optional, self._work_id, seconds)
            except TransientError as error:
                delay = max(backoff.next_delay(), error.retry_after or 0.0)
                if context.clock() + delay >= until:
                    raise
            else:
                if item is None:
                    raise RefusedError("list", None, "the item is not among those listed")
                return item
            await asyncio.sleep(delay)


def _build_item(work_id: str, session_id: str, environment_id: str) -> WorkItem:
    """Build the item from its ids, without a request; its metadata is empty."""
    data = {"type": SESSION, "id": session_id}
    item = {"id": work_id, "environment_id": environment_id, "data": data, "state": ACTIVE}
    return parse_item(item)
