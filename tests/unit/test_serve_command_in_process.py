"""`workpool serve`, run in pytest's process, ends after a signal or a failure of its store."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from workpool.cli.serve import _retention_seconds, _serve_until_signal
from workpool.server import ControlPlane, MemoryStore, StoreError

if TYPE_CHECKING:
    from workpool.server.stores.store import StoreContents

pytestmark = pytest.mark.usefixtures("signal_recorder")


class StoreWithSlowOpening(MemoryStore):
    """A store whose method `open` waits until a test sets the event `opened`."""

    def __init__(self) -> None:
        self.opening = asyncio.Event()
        self.opened = asyncio.Event()
        self.closed = False

    async def open(self) -> StoreContents:
        self.opening.set()
        await self.opened.wait()
        return await super().open()

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("store", "given", "expected"),
    [("memory", None, 3600), ("work.db", None, 86_400), ("memory", 60, 60), ("work.db", 90, 90)],
)
def test_default_retention_is_one_hour_in_memory_and_one_day_in_database_file(
    store: str, given: float | None, expected: float
) -> None:
    assert _retention_seconds(store, given) == expected


async def test_sigterm_ends_serve_command_while_its_store_is_opening(
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = StoreWithSlowOpening()
    plane = ControlPlane(store=store)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(_serve_until_signal(plane, shown=None, as_json=True))
        await store.opening.wait()
        signal.raise_signal(signal.SIGTERM)
    assert store.closed
    assert capsys.readouterr().out == ""


async def test_serve_command_raises_error_of_store_that_has_failed() -> None:
    class FailingStore(StoreWithSlowOpening):
        async def wait_for_failure(self) -> None:
            raise StoreError("it is full")

    store = FailingStore()
    store.opened.set()
    async with asyncio.timeout(20):
        with pytest.raises(StoreError, match="it is full"):
            await _serve_until_signal(ControlPlane(store=store), shown=None, as_json=True)
    assert store.closed
