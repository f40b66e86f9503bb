"""Calls of plugins: handlers, contexts, events, and the plugin that an error names."""

import asyncio
import functools
import itertools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Union, get_args

import pytest

from tests.unit.loaded_plugins import chosen, item, load
from workpool.errors import PluginError
from workpool.events import DrainStarted, Event, PluginFailed, SessionFinished
from workpool.handlers import handler
from workpool.hookspecs import hookimpl
from workpool.plugins import Plugins
from workpool.session import Session
from workpool.wire.items import WorkItem

FACT = DrainStarted(timeout=20.0)


def marked(name: str = "daily", **rule: Any) -> Any:
    @handler(**rule)
    async def function(session: Session) -> None: ...

    function.__name__ = name
    return function


class Answering:
    """A plugin that answers every item with one method; subclasses give it names."""

    async def run(self, session: Session) -> None: ...

    @hookimpl
    def workpool_session_handler(self) -> Callable[[Session], Awaitable[object]]:
        return self.run


class First(Answering): ...


class Second(Answering): ...


# -- who answers -----------------------------------------------------------------------------------


def test_plugin_objects_precede_names_and_first_answer_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "named_plugin_of_this_test"
    (tmp_path / f"{name}.py").write_text(
        "from workpool.hookspecs import hookimpl\n"
        "async def run(session): ...\n"
        "@hookimpl\ndef workpool_session_handler(item): return run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert chosen(load(First(), Second(), names=(name,)), item()) == "First.run"
    assert chosen(load(Second(), First(), names=(name,)), item()) == "Second.run"
    assert chosen(load(names=(name,)), item()) == f"{name}.run"
    assert chosen(load(name, First()), item()) == f"{name}.run"
    del sys.modules[name]


def test_plugin_that_answers_none_leaves_choice_to_next_plugin() -> None:
    class Nothing:
        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> None: ...

    assert chosen(load(Nothing(), Second()), item()) == "Second.run"


def test_tryfirst_and_trylast_change_order_of_plugins() -> None:
    class Early(Answering):
        @hookimpl(tryfirst=True)
        def workpool_session_handler(self) -> Any:
            return self.run

    class Late(Answering):
        @hookimpl(trylast=True)
        def workpool_session_handler(self) -> Any:
            return self.run

    assert chosen(load(Late(), First(), Early()), item()) == "Early.run"
    assert chosen(load(Late(), First()), item()) == "First.run"


def test_hook_of_plugin_precedes_its_rules_and_next_plugin() -> None:
    class Mixed:
        async def special(self, session: Session) -> None: ...

        @handler
        async def rest(self, session: Session) -> None: ...

        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> Any:
            return self.special if "special" in item.metadata else None

    plugins = load(Mixed(), Second())
    assert chosen(plugins, item(special="yes")) == "Mixed.special"
    assert chosen(plugins, item()) == "Mixed.rest"


def test_rule_matches_equal_type_and_equal_metadata() -> None:
    plugins = load(marked(type="build", metadata={"job": "a", "team": "x"}))
    assert chosen(plugins, item("build", job="a", team="x", more="1")) == "daily.daily"
    assert chosen(plugins, item("session", job="a", team="x")) is None
    assert chosen(plugins, item("build", job="a")) is None
    assert chosen(plugins, item("build", job="a", team="y")) is None
    assert chosen(plugins, item("build")) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_more_specific_rule_is_used_first_in_any_order(order: tuple[int, ...]) -> None:
    functions = [
        marked("anything"),
        marked("reports", metadata={"job": "report"}),
        marked("daily", metadata={"job": "report", "every": "day"}),
    ]

    module = type("Jobs", (), {str(function): staticmethod(function) for function in functions})
    for plugins in (load(*(functions[index] for index in order)), load(module)):

        def function_for(plugins: Plugins, **metadata: str) -> object:
            answer = plugins.handler_for(item(**metadata))
            return answer and answer.call

        assert function_for(plugins) is functions[0]
        assert function_for(plugins, job="report") is functions[1]
        assert function_for(plugins, job="report", every="day") is functions[2]
        assert function_for(plugins, every="day") is functions[0]


def test_unrelated_rules_are_used_in_order_of_plugins() -> None:
    one, two = marked("one", metadata={"a": "1"}), marked("two", metadata={"b": "1", "c": "1"})
    both = item(a="1", b="1", c="1")
    assert chosen(load(one, two), both) == "one.one"
    assert chosen(load(two, one), both) == "two.two"
    assert chosen(load(First(), two), both) == "First.run"


def test_plugins_without_handlers_are_reported_as_unable_to_handle() -> None:
    class Observer:
        @hookimpl
        def workpool_event(self, event: Event) -> None: ...

    assert not load(Observer()).can_handle
    assert load(Observer()).handler_for(item()) is None
    assert load(First()).can_handle
    assert load(marked()).can_handle
    assert not load(First()).wanted


async def top(session: Session) -> None: ...


@handler(timeout=9.0, max_sessions=1)
async def limited(session: Session) -> None: ...


class Call:
    async def __call__(self, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("call", "name", "limits"),
    [
        (top, "Router.top", (None, None)),
        (functools.partial(top), "Router.top", (None, None)),
        (Call(), "Router.Call", (None, None)),
        (limited, "Router.limited", (9.0, 1)),
        (functools.partial(limited), "Router.limited", (9.0, 1)),
    ],
)
def test_async_callable_answered_by_hook_is_accepted(
    call: Any, name: str, limits: tuple[Any, Any]
) -> None:
    class Router:
        @hookimpl
        def workpool_session_handler(self) -> Any:
            return functools.partial(call) if isinstance(call, functools.partial) else call

    plugins = load(Router())
    answer = plugins.handler_for(item())
    assert answer is not None
    assert (answer.name, answer.plugin) == (name, "Router")
    assert (answer.timeout, answer.max_sessions) == limits
    assert answer == plugins.handler_for(item(job="other"))


# -- who observes what -----------------------------------------------------------------------------


def hook(annotation: object) -> Any:
    """Return a plugin whose `workpool_event` has this annotation."""

    def workpool_event(event: Any) -> None: ...

    workpool_event.__annotations__["event"] = annotation
    return type("Observer", (), {"workpool_event": staticmethod(hookimpl(workpool_event))})()


@pytest.mark.parametrize(
    ("annotation", "wanted"),
    [
        (DrainStarted, {DrainStarted}),
        (DrainStarted | PluginFailed, {DrainStarted, PluginFailed}),
        (Union[DrainStarted, PluginFailed], {DrainStarted, PluginFailed}),  # noqa: UP007 - the older form
        ("DrainStarted | PluginFailed", {DrainStarted, PluginFailed}),
        ("SessionFinished", {SessionFinished}),  # imported for type checkers only
        (Event, set(get_args(Event))),
        (Any, set(get_args(Event))),
        ("object", set(get_args(Event))),
    ],
    ids=["type", "union", "Union", "text", "text not imported", "Event", "Any", "object"],
)
def test_observer_receives_event_types_of_its_annotation(
    annotation: object, wanted: set[type]
) -> None:
    assert load(hook(annotation)).wanted == wanted


def test_observer_without_annotation_receives_every_event_type() -> None:
    class Bare:
        @hookimpl
        def workpool_event(self, event):  # type: ignore[no-untyped-def]  # the case
            ...

    class Argumentless:
        @hookimpl
        def workpool_event(self) -> None: ...

    for plugin in (Bare(), Argumentless()):
        assert load(plugin).wanted == set(get_args(Event))


def test_observers_of_different_types_receive_only_their_types() -> None:
    class Drains(Recorder):
        @hookimpl
        def workpool_event(self, event: DrainStarted) -> None:  # type: ignore[override]  # as in a plugin
            self.seen.append(event)

    class Failures(Recorder):
        @hookimpl
        def workpool_event(self, event: PluginFailed) -> None:  # type: ignore[override]  # as in a plugin
            self.seen.append(event)

    drains, failures = Drains(), Failures()
    plugins = load(drains, failures)
    failed = PluginFailed("mail", "workpool_event", ValueError())
    for event in (FACT, failed):
        plugins.notify(event)
    assert plugins.wanted == {DrainStarted, PluginFailed}
    assert (drains.seen, failures.seen) == ([FACT], [failed])


# -- errors later on -------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.seen.append(event)


class Failing:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or ValueError("secret of the plugin")
        self.calls: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.calls.append(event)
        raise self.error


class AlsoFailing(Failing): ...


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_handler_hook_that_raises_fails_choice_and_is_reported(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def workpool_session_handler(self) -> None:
            raise error

    recorder, metrics = Recorder(), Recorder()
    plugins = load(Broken(), First(), recorder)
    plugins.metrics = metrics.workpool_event
    with pytest.raises(PluginError) as caught:
        plugins.handler_for(item())
    assert caught.value.plugin == "Broken"
    assert caught.value.__cause__ is error
    fact = PluginFailed("Broken", "workpool_session_handler", error)
    assert recorder.seen == metrics.seen == [fact]
    assert "workpool_session_handler raised" in caplog.text


def plain_def(session: Session) -> None: ...


def not_async(session: Session) -> Awaitable[None]:
    return top(session)


class Hostile:
    def __getattr__(self, name: str) -> object:
        raise ZeroDivisionError(name)


def test_handler_hook_answer_that_raises_on_inspection_is_plugin_error() -> None:
    class Broken:
        @hookimpl
        def workpool_session_handler(self) -> object:
            return Hostile()

    with pytest.raises(PluginError, match=r"'Broken': looking at the answer .* ZeroDivisionError"):
        load(Broken()).handler_for(item())


@pytest.mark.parametrize("answer", [plain_def, 7, Call, not_async, True])
def test_handler_hook_answer_that_is_not_callable_is_plugin_error(answer: object) -> None:
    class Broken:
        @hookimpl
        def workpool_session_handler(self) -> object:
            return answer

    recorder = Recorder()
    plugins = load(Broken(), recorder)
    with pytest.raises(PluginError, match=r"'Broken': .* not an async callable") as caught:
        plugins.handler_for(item())
    assert recorder.seen == [PluginFailed("Broken", "workpool_session_handler", caught.value)]


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_failing_observer_is_reported_to_the_other_observers(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Recorder(), type("After", (Recorder,), {})()
    failing, metrics = Failing(error), Recorder()
    plugins = load(before, failing, after)
    plugins.metrics = metrics.workpool_event
    plugins.notify(FACT)

    failed = PluginFailed("Failing", "workpool_event", error)
    assert before.seen == [FACT, failed]
    assert after.seen == [failed, FACT]
    assert metrics.seen == [failed]
    assert failing.calls == [FACT]
    assert "'Failing': workpool_event raised" in caplog.text


def test_two_failing_observers_are_reported_once_per_event() -> None:
    one, two, metrics = Failing(), AlsoFailing(), Recorder()
    plugins = load(one, two)
    plugins.metrics = metrics.workpool_event
    plugins.notify(FACT)

    assert (len(one.calls), len(two.calls)) == (2, 2)
    blamed = [event.plugin for event in metrics.seen if isinstance(event, PluginFailed)]
    assert blamed == ["Failing", "AlsoFailing", "AlsoFailing", "Failing"]


def test_repeated_observer_failure_is_logged_with_traceback_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = Failing()
    plugins = load(failing)
    plugins.notify(FACT)
    plugins.notify(FACT)
    failing.error = KeyError("other")
    plugins.notify(FACT)

    assert [bool(record.exc_info) for record in caplog.records] == [True, False, True]


def test_keyboard_interrupt_in_observer_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        load(Failing(KeyboardInterrupt())).notify(FACT)


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
def test_context_hook_that_raises_is_not_caught(hook: str) -> None:
    def implementation() -> None:
        raise LookupError("no database")

    plugins = load(type("Broken", (), {hook: staticmethod(hookimpl(implementation))})())
    argument: Any = None
    ask = plugins.contexts if hook == "workpool_wrap_session" else plugins.lifespans
    with pytest.raises(LookupError, match="no database"):
        ask(argument)


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
@pytest.mark.parametrize("answer", [7, MappingProxyType({}), open])
def test_context_hook_answer_that_is_no_context_is_plugin_error(hook: str, answer: object) -> None:
    def implementation() -> object:
        return answer

    plugins = load(type("Broken", (), {hook: staticmethod(hookimpl(implementation))})())
    argument: Any = None
    ask = plugins.contexts if hook == "workpool_wrap_session" else plugins.lifespans
    with pytest.raises(PluginError, match=f"'Broken': {hook} returned .* async context manager"):
        ask(argument)
