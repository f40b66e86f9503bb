"""Fixtures for integration tests; after each test no task and no logged loop error may remain."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson
import pytest

from tests.integration.shared_handlers import UncancellableHandler
from workpool import handler
from workpool.events import SessionFinished
from workpool.handlers import find_handler_rule
from workpool.pool import completion, diagnostics, drain, lease
from workpool.server.http.server_dialects import DIALECTS
from workpool.testing import literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from workpool import Supervisor
    from workpool.server import ControlPlane, Item
    from workpool.testing import Faults, Recorder, Request

    class PoolFactory(Protocol):
        def __call__(self, *plugins: object, **settings: Any) -> Supervisor: ...


@pytest.fixture(autouse=True)
async def check_no_task_or_error_left() -> AsyncIterator[None]:
    """Check after each test that no task of the test remains and that the loop logged no error."""
    problems: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    assert not left
    assert not problems


@pytest.fixture(autouse=True)
def relax_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Increase the time limits for loop lag, drains and release marks, for loaded machines.

    Tests of blocked loops replace this fixture.
    """
    monkeypatch.setattr(diagnostics, "LAG_WARNING_SECONDS", 15.0)
    monkeypatch.setattr(drain, "AFTER_DEADLINE_SECONDS", 40.0)
    monkeypatch.setattr(completion, "MARK_SECONDS", 20.0)


@dataclass
class EndedItem:
    """The outcome, the requests and the final state of an item that a pool ran."""

    item: Item
    finished: SessionFinished
    sent: list[Request]
    """All requests that the pool sent for the item, in order."""
    history: list[str]

    @property
    def request_names(self) -> list[str]:
        return [request.op for request in self.sent]

    @property
    def outcome(self) -> str:
        return self.finished.outcome

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.item.metadata)


class SessionEndWaiter(Protocol):
    def __call__(self, work_id: str) -> Awaitable[EndedItem]: ...


class OneItemRunner(Protocol):
    def __call__(self, call: Callable[[Any], Any], **settings: Any) -> Awaitable[EndedItem]: ...


@pytest.fixture
def wait_for_session_end(
    control_plane: ControlPlane, faults: Faults, recorder: Recorder
) -> SessionEndWaiter:
    """Return a function that waits until an item's session ends, and returns an `EndedItem`."""

    async def read_final_item(work_id: str) -> EndedItem:
        finished = await recorder.wait_for(
            SessionFinished, lambda event: event.session.item.id == work_id
        )
        return EndedItem(
            item=control_plane.operations.get_item(control_plane.environments[0], work_id),
            finished=finished,
            sent=faults.of(work_id=work_id),
            history=[record.kind for record in control_plane.history.records_of_item(work_id)],
        )

    return read_final_item


@pytest.fixture
def run_one_item(
    control_plane: ControlPlane, make_pool: PoolFactory, wait_for_session_end: SessionEndWaiter
) -> OneItemRunner:
    """Return a function that runs a pool with one handler until one item's session has ended."""

    async def run_pool_until_session_ends(call: Callable[[Any], Any], **settings: Any) -> EndedItem:
        (item,) = control_plane.enqueue()
        plugin = call if find_handler_rule(call) else handler(call)
        async with make_pool(plugin, **settings):
            await wait_for_session_end(item.id)
        return await wait_for_session_end(item.id)

    return run_pool_until_session_ends


@pytest.fixture
def heartbeat_now(control_plane: ControlPlane, faults: Faults) -> Callable[[str], None]:
    """Return a function that makes the pool send a heartbeat at once.

    The next poll returns a copy of the held item, so the pool checks its lease by a heartbeat.
    """

    def request_heartbeat(work_id: str) -> None:
        def encode_polled_item() -> bytes:
            item = control_plane.operations.get_item(control_plane.environments[0], work_id)
            return orjson.dumps(DIALECTS["qoder"].item_json(item))

        faults.add(literal(encode_polled_item), "poll", times=1)

    return request_heartbeat


@pytest.fixture
def short_release_mark_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a drain wait only 0.1 s for the answer to the metadata that it writes about a release."""
    monkeypatch.setattr(completion, "MARK_SECONDS", 0.1)


@pytest.fixture
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew leases ten times a second instead of every third of their TTL."""
    monkeypatch.setattr(lease, "RENEW_PART", 600)


@pytest.fixture
def uncancellable_handler() -> Iterator[UncancellableHandler]:
    """Return a handler that ignores cancellation, and end it after the test.

    A handler that still runs would keep the event loop from closing.
    """
    made = UncancellableHandler()
    yield made
    made.may_end.set()
