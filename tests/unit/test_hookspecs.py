"""Each of the five hooks, implemented by a plugin and called as the pool calls it."""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest

from tests.unit.plugin_helpers import make_work_item
from workpool import hookspecs
from workpool.events import DrainStarted, Event
from workpool.hookspecs import hookimpl
from workpool.plugins import Plugins
from workpool.session import Session

ITEM = make_work_item()


HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("workpool_")}


def test_hook_specifications_are_five_documented_functions_with_one_argument() -> None:
    assert list(HOOKS) == [
        "workpool_session_handler",
        "workpool_wrap_session",
        "workpool_lifespan",
        "workpool_admission",
        "workpool_event",
    ]
    for spec in HOOKS.values():
        assert len(inspect.signature(spec).parameters) == 1
        assert not inspect.iscoroutinefunction(spec)
        assert spec.__doc__


async def test_session_handler_hook_chooses_handler_for_item() -> None:
    class PluginWithSessionHandlerHook:
        async def run_session(self, session: Session) -> dict[str, str]:
            return {"ran": session.id}

        @hookimpl
        def workpool_session_handler(self, item: Any) -> Callable[..., Any] | None:
            return self.run_session if item.type == "session" else None

    handler = Plugins.load([PluginWithSessionHandlerHook()], [], {}).find_handler_for_item(ITEM)

    assert handler is not None
    assert (handler.name, handler.plugin) == (
        "PluginWithSessionHandlerHook.run_session",
        "PluginWithSessionHandlerHook",
    )
    call: Any = handler.call
    assert await call(Session(ITEM, cast("Any", None), redelivered=False)) == {"ran": "sess_1"}


async def enter_all_contexts(contexts: Any, seen: list[str]) -> None:
    async with AsyncExitStack() as stack:
        for _, context in contexts:
            await stack.enter_async_context(context)
        seen.append("inside")


async def test_contexts_of_wrap_session_hooks_are_left_in_reverse_order_of_entry() -> None:
    seen: list[str] = []

    class FirstSessionWrapperPlugin:
        @hookimpl
        @asynccontextmanager
        async def workpool_wrap_session(self, session: Session) -> AsyncIterator[None]:
            seen.append(f"first in {session.id}")
            yield
            seen.append("first out")

    class PluginWithoutContext:
        @hookimpl
        def workpool_wrap_session(self, session: Session) -> None:
            seen.append(f"asked {session.id}")

    class SecondSessionWrapperPlugin:
        @hookimpl
        @asynccontextmanager
        async def workpool_wrap_session(self) -> AsyncIterator[None]:
            seen.append("second in")
            yield
            seen.append("second out")

    plugins = Plugins.load(
        [FirstSessionWrapperPlugin(), PluginWithoutContext(), SecondSessionWrapperPlugin()], [], {}
    )
    contexts = plugins.collect_session_contexts(Session(ITEM, cast("Any", None), redelivered=False))
    assert [name for name, _ in contexts] == [
        "FirstSessionWrapperPlugin",
        "SecondSessionWrapperPlugin",
    ]
    await enter_all_contexts(contexts, seen)

    assert seen == [
        "asked sess_1",
        "first in sess_1",
        "second in",
        "inside",
        "second out",
        "first out",
    ]


async def test_context_of_lifespan_hook_is_open_while_pool_runs() -> None:
    seen: list[str] = []

    class DatabasePlugin:
        @hookimpl
        @asynccontextmanager
        async def workpool_lifespan(self, supervisor: Any) -> AsyncIterator[None]:
            seen.append(f"open for {supervisor}")
            yield
            seen.append("closed")

    plugins = Plugins.load([DatabasePlugin()], [], {})
    await enter_all_contexts(plugins.collect_lifespan_contexts(cast("Any", "the pool")), seen)

    assert seen == ["open for the pool", "inside", "closed"]


def test_admission_hook_that_raises_error_or_returns_reason_prevents_claims() -> None:
    answers: list[Any] = [None, "disk full", 7, RuntimeError("x")]
    asked: list[object] = []

    class DiskCheckPlugin:
        @hookimpl
        def workpool_admission(self, supervisor: object) -> str | None:
            asked.append(supervisor)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return cast("str | None", answer)

    plugins = Plugins.load([DiskCheckPlugin()], [], {})
    failures: list[Event] = []
    plugins.metrics = failures.append
    assert plugins.has_admission_hook
    assert [plugins.admission_refusal_reason("the pool") for _ in range(4)] == [
        None,
        "DiskCheckPlugin: disk full",
        "DiskCheckPlugin: workpool_admission failed",
        "DiskCheckPlugin: workpool_admission failed",
    ]
    assert asked == ["the pool"] * 4
    assert len(failures) == 2
    assert not Plugins.load([], [], {}).has_admission_hook


def test_workpool_event_hook_of_plugin_receives_reported_event() -> None:
    seen: list[Event] = []

    class EventRecorderPlugin:
        @hookimpl
        def workpool_event(self, event: Event) -> None:
            seen.append(event)

    plugins = Plugins.load([EventRecorderPlugin()], [], {})
    assert plugins.wanted
    fact = DrainStarted(timeout=20.0)
    plugins.notify_observers(fact)

    assert seen == [fact]


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_implementation_may_omit_its_argument(hook: str) -> None:
    called: list[str] = []

    @hookimpl
    def record_hook_call() -> None:
        called.append(hook)

    plugin = type("Plugin", (), {hook: staticmethod(record_hook_call)})()
    plugins = Plugins.load([plugin], [], {})
    session = Session(ITEM, cast("Any", None), redelivered=False)
    assert plugins.find_handler_for_item(ITEM) is None
    assert plugins.collect_session_contexts(session) == []
    assert plugins.collect_lifespan_contexts(cast("Any", None)) == []
    assert plugins.admission_refusal_reason(None) is None
    plugins.notify_observers(DrainStarted(timeout=None))

    assert called == [hook]
