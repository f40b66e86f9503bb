"""Plugins whose `workpool_lifespan` misbehaves: the pool starts and ends in bounded time."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from workpool import Session, handler, hookimpl
from workpool.errors import PluginError
from workpool.pool.drain import Drain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@handler
async def return_at_once(_: Session) -> None:
    return None


class CancelledErrorPlugin:
    """A plugin that raises a CancelledError although its task was not cancelled."""

    def __init__(self, where: str) -> None:
        self.where = where

    @hookimpl
    def workpool_lifespan(self) -> Any:
        self.raise_cancelled_error("hook")
        return self.context_raising_cancelled_error()

    @asynccontextmanager
    async def context_raising_cancelled_error(self) -> AsyncIterator[None]:
        self.raise_cancelled_error("entering")
        yield
        self.raise_cancelled_error("leaving")

    def raise_cancelled_error(self, where: str) -> None:
        if where == self.where:
            raise asyncio.CancelledError


@pytest.mark.parametrize("where", ["hook", "entering", "leaving"])
async def test_cancelled_error_raised_by_plugin_becomes_plugin_error(
    make_pool: Any, where: str
) -> None:
    entered = False
    with pytest.raises(PluginError, match="CancelledError") as caught:
        async with make_pool(return_at_once, CancelledErrorPlugin(where)):
            entered = True
    assert caught.value.plugin == "CancelledErrorPlugin"
    assert entered is (where == "leaving")


class ExceptionSwallowingPlugin(AbstractAsyncContextManager[None]):
    """A plugin whose context swallows every exception: its `__aexit__` returns True."""

    def __init__(self) -> None:
        self.left_with: list[BaseException | None] = []

    @hookimpl
    def workpool_lifespan(self) -> Any:
        return self

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.left_with.append(error)
        return True


class PluginFailingAtStart:
    """A plugin whose context cannot be entered."""

    @hookimpl
    def workpool_lifespan(self) -> Any:
        return self.failing_context()

    @asynccontextmanager
    async def failing_context(self) -> AsyncIterator[None]:
        raise LookupError("no database")
        yield


async def test_plugin_that_suppresses_errors_cannot_hide_start_error_of_another_plugin(
    make_pool: Any,
) -> None:
    swallowing = ExceptionSwallowingPlugin()
    pool = make_pool(return_at_once, swallowing, PluginFailingAtStart())
    entered = False
    with pytest.raises(LookupError, match="no database"):
        async with pool:
            entered = True
    assert not entered
    assert [type(error) for error in swallowing.left_with] == [LookupError]


async def test_pool_run_raises_error_of_crash_although_lifespan_plugin_suppresses_it(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def raise_error(*_: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Drain, "finish_sessions", raise_error)
    swallowing = ExceptionSwallowingPlugin()
    pool = make_pool(return_at_once, swallowing)
    async with asyncio.timeout(20):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await pool.run(until_empty=True)
    assert swallowing.left_with[0] is not None


class UncancellablePlugin:
    """A plugin whose context ignores cancellation until the test lets it end."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.reached = asyncio.Event()
        self.may_end = asyncio.Event()

    @hookimpl
    def workpool_lifespan(self) -> Any:
        return self.uncancellable_context()

    @asynccontextmanager
    async def uncancellable_context(self) -> AsyncIterator[None]:
        await self.ignore_cancellation_in_phase("opening")
        yield
        await self.ignore_cancellation_in_phase("closing")

    async def ignore_cancellation_in_phase(self, where: str) -> None:
        if where != self.where:
            return
        self.reached.set()
        while not self.may_end.is_set():
            with suppress(asyncio.CancelledError):
                await self.may_end.wait()

    async def end_plugin_context(self) -> None:
        """Let the plugin's context end, and wait until the pool's task has ended.

        The start or run of the pool has ended earlier, after a limited wait for that task.
        """
        self.may_end.set()
        [root] = [task for task in asyncio.all_tasks() if task.get_name() == "workpool"]
        await asyncio.wait({root}, timeout=20)


@pytest.fixture
def short_close_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workpool.pool.supervisor.CLOSE_SECONDS", 0.1)
    monkeypatch.setattr("workpool.plugins.lifespan.CLOSE_SECONDS", 0.05)


@pytest.mark.usefixtures("short_close_timeouts")
async def test_cancelled_pool_start_ends_although_plugin_ignores_cancellation(
    make_pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = UncancellablePlugin("opening")
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(make_pool(return_at_once, plugin).__aenter__())
        await plugin.reached.wait()
        starting.cancel()
        await asyncio.wait({starting}, timeout=20)
    assert starting.cancelled()
    assert "pool did not close" in caplog.text
    await plugin.end_plugin_context()


@pytest.mark.usefixtures("short_close_timeouts")
async def test_run_of_pool_ends_although_context_of_plugin_never_closes(
    make_pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = UncancellablePlugin("closing")
    pool = make_pool(return_at_once, plugin)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(pool.run(until_empty=True))
        await running
    assert "pool did not close" in caplog.text
    await plugin.end_plugin_context()
