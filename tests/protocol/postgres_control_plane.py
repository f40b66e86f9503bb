"""A second server node on the same PostgreSQL database, which tests can call without `await`.

A test calls `plane.enqueue()` and `plane.operations.get_item(…)` without `await`. With PostgreSQL,
these calls are coroutines. So a second node on the same database runs them, on an event loop on a
thread of its own, while the test waits.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from workpool.server import ControlPlane
from workpool.server.parsing.request_values import ListPageRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from workpool.server import Operations, PostgresStore
    from workpool.server.engine import ControlPlaneEngine
    from workpool.server.pagination import ListPage
    from workpool.server.stored_item import Item

WAIT_SECONDS = 20
CALLS = {
    "ack_item",
    "emit_events",
    "enqueue",
    "get_item",
    "heartbeat",
    "queue_stats",
    "stop_item",
    "update_metadata",
}
"""The calls of `Operations` that the engine has with the same parameters."""


class NodeWithBlockingCalls:
    """A server node on a thread of its own. Each call blocks until the node returns the result.

    The calls have the names and parameters of those of `Operations`.
    """

    def __init__(self, engine: ControlPlaneEngine) -> None:
        self._engine = engine
        self._loop = asyncio.new_event_loop()

    @contextmanager
    def run_loop_in_thread(self) -> Iterator[None]:
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            self._wait_for_result(self._engine.open())
            yield
        finally:
            self._wait_for_result(self._engine.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            pytest.skip(
                f"PostgreSQL has no `operations.{name}`, which only the index in memory has"
            )

        def call_engine_and_wait(*arguments: Any, **options: Any) -> Any:
            return self._wait_for_result(getattr(self._engine, name)(*arguments, **options))

        return call_engine_and_wait

    def list_items(self, environment_id: str, limit: int = 20) -> ListPage[Item]:
        found: ListPage[Item] = self._wait_for_result(
            self._engine.list_items(environment_id, ListPageRequest(limit, "", None))
        )
        return found

    @property
    def history(self) -> Any:
        return self._wait_for_result(self._engine.read_history())

    def _wait_for_result(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(WAIT_SECONDS)


class PostgresControlPlane(ControlPlane):
    """A control plane on PostgreSQL whose `operations` are blocking calls, not coroutines."""

    def __init__(self, *, store: PostgresStore, **options: Any) -> None:
        super().__init__(store=store, **options)
        self.node = NodeWithBlockingCalls(ControlPlane(store=store, **options).engine)

    @property
    def operations(self) -> Operations:
        operations: Any = self.node
        return operations  # type: ignore[no-any-return] # - it has the calls that tests use
