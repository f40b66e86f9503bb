"""Plugins: their choice of handlers, their observers, their context managers, and their errors."""

import asyncio
import functools
import itertools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Union, get_args

import pytest

from tests.unit.plugin_helpers import get_chosen_handler_name, load_plugins, make_work_item
from workpool.errors import PluginError
from workpool.events import DrainStarted, Event, PluginFailed, SessionFinished
from workpool.handlers import handler
from workpool.hookspecs import hookimpl
from workpool.plugins import Plugins
from workpool.session import Session
from workpool.wire.items import WorkItem

FACT = DrainStarted(timeout=20.0)


def make_decorated_handler(name: str = "daily", **rule: Any) -> Any:
    @handler(**rule)
    async def handler_function(session: Session) -> None: ...

    handler_function.__name__ = name
    return handler_function


class PluginChoosingOneHandler:
    """A plugin whose hook chooses the same handler, a method, for each item."""

    async def run_session(self, session: Session) -> None: ...

    @hookimpl
    def workpool_session_handler(self) -> Callable[[Session], Awaitable[object]]:
        return self.run_session


class FirstPlugin(PluginChoosingOneHandler): ...


class SecondPlugin(PluginChoosingOneHandler): ...


def test_handler_hooks_of_plugin_objects_precede_those_of_named_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "named_plugin_of_this_test"
    (tmp_path / f"{name}.py").write_text(
        "from workpool.hookspecs import hookimpl\n"
        "async def run(session): ...\n"
        "@hookimpl\ndef workpool_session_handler(item): return run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        get_chosen_handler_name(
            load_plugins(FirstPlugin(), SecondPlugin(), names=(name,)), make_work_item()
        )
        == "FirstPlugin.run_session"
    )
    assert (
        get_chosen_handler_name(
            load_plugins(SecondPlugin(), FirstPlugin(), names=(name,)), make_work_item()
        )
        == "SecondPlugin.run_session"
    )
    assert get_chosen_handler_name(load_plugins(names=(name,)), make_work_item()) == f"{name}.run"
    assert (
        get_chosen_handler_name(load_plugins(name, FirstPlugin()), make_work_item())
        == f"{name}.run"
    )
    del sys.modules[name]


def test_next_plugin_chooses_handler_if_first_handler_hook_returns_none() -> None:
    class PluginThatReturnsNone:
        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> None: ...

    assert (
        get_chosen_handler_name(
            load_plugins(PluginThatReturnsNone(), SecondPlugin()), make_work_item()
        )
        == "SecondPlugin.run_session"
    )


def test_hook_options_tryfirst_and_trylast_change_order_of_plugins() -> None:
    class PluginWithTryfirstHook(PluginChoosingOneHandler):
        @hookimpl(tryfirst=True)
        def workpool_session_handler(self) -> Any:
            return self.run_session

    class PluginWithTrylastHook(PluginChoosingOneHandler):
        @hookimpl(trylast=True)
        def workpool_session_handler(self) -> Any:
            return self.run_session

    assert (
        get_chosen_handler_name(
            load_plugins(PluginWithTrylastHook(), FirstPlugin(), PluginWithTryfirstHook()),
            make_work_item(),
        )
        == "PluginWithTryfirstHook.run_session"
    )
    assert (
        get_chosen_handler_name(
            load_plugins(PluginWithTrylastHook(), FirstPlugin()), make_work_item()
        )
        == "FirstPlugin.run_session"
    )


def test_handler_hook_is_tried_before_rules_of_its_plugin_and_before_next_plugin() -> None:
    class PluginWithHookAndHandlerRules:
        async def handler_chosen_by_hook(self, session: Session) -> None: ...

        @handler
        async def handler_chosen_by_rule(self, session: Session) -> None: ...

        @hookimpl
        def workpool_session_handler(self, item: WorkItem) -> Any:
            return self.handler_chosen_by_hook if "special" in item.metadata else None

    plugins = load_plugins(PluginWithHookAndHandlerRules(), SecondPlugin())
    assert (
        get_chosen_handler_name(plugins, make_work_item(special="yes"))
        == "PluginWithHookAndHandlerRules.handler_chosen_by_hook"
    )
    assert (
        get_chosen_handler_name(plugins, make_work_item())
        == "PluginWithHookAndHandlerRules.handler_chosen_by_rule"
    )


def test_rule_matches_item_with_its_type_and_all_its_metadata() -> None:
    plugins = load_plugins(make_decorated_handler(type="build", metadata={"job": "a", "team": "x"}))
    assert (
        get_chosen_handler_name(plugins, make_work_item("build", job="a", team="x", more="1"))
        == "daily.daily"
    )
    assert get_chosen_handler_name(plugins, make_work_item("session", job="a", team="x")) is None
    assert get_chosen_handler_name(plugins, make_work_item("build", job="a")) is None
    assert get_chosen_handler_name(plugins, make_work_item("build", job="a", team="y")) is None
    assert get_chosen_handler_name(plugins, make_work_item("build")) is None


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_more_specific_rule_wins_in_any_registration_order(order: tuple[int, ...]) -> None:
    functions = [
        make_decorated_handler("anything"),
        make_decorated_handler("reports", metadata={"job": "report"}),
        make_decorated_handler("daily", metadata={"job": "report", "every": "day"}),
    ]

    module = type("Jobs", (), {str(function): staticmethod(function) for function in functions})
    for plugins in (load_plugins(*(functions[index] for index in order)), load_plugins(module)):

        def get_chosen_handler_function(plugins: Plugins, **metadata: str) -> object:
            answer = plugins.find_handler_for_item(make_work_item(**metadata))
            return answer and answer.call

        assert get_chosen_handler_function(plugins) is functions[0]
        assert get_chosen_handler_function(plugins, job="report") is functions[1]
        assert get_chosen_handler_function(plugins, job="report", every="day") is functions[2]
        assert get_chosen_handler_function(plugins, every="day") is functions[0]


def test_rule_of_earlier_plugin_wins_if_two_unrelated_rules_match_item() -> None:
    one, two = (
        make_decorated_handler("one", metadata={"a": "1"}),
        make_decorated_handler("two", metadata={"b": "1", "c": "1"}),
    )
    both = make_work_item(a="1", b="1", c="1")
    assert get_chosen_handler_name(load_plugins(one, two), both) == "one.one"
    assert get_chosen_handler_name(load_plugins(two, one), both) == "two.two"
    assert (
        get_chosen_handler_name(load_plugins(FirstPlugin(), two), both) == "FirstPlugin.run_session"
    )


def test_plugins_without_handler_hook_or_rule_cannot_handle_any_item() -> None:
    class PluginWithEventHookOnly:
        @hookimpl
        def workpool_event(self, event: Event) -> None: ...

    assert not load_plugins(PluginWithEventHookOnly()).can_supply_handler
    assert load_plugins(PluginWithEventHookOnly()).find_handler_for_item(make_work_item()) is None
    assert load_plugins(FirstPlugin()).can_supply_handler
    assert load_plugins(make_decorated_handler()).can_supply_handler
    assert not load_plugins(FirstPlugin()).wanted


async def module_level_handler(session: Session) -> None: ...


@handler(timeout=9.0, max_sessions=1)
async def handler_with_two_limits(session: Session) -> None: ...


class CallableHandlerObject:
    async def __call__(self, session: Session) -> None: ...


@pytest.mark.parametrize(
    ("call", "name", "limits"),
    [
        (module_level_handler, "RoutingPlugin.module_level_handler", (None, None)),
        (
            functools.partial(module_level_handler),
            "RoutingPlugin.module_level_handler",
            (None, None),
        ),
        (CallableHandlerObject(), "RoutingPlugin.CallableHandlerObject", (None, None)),
        (handler_with_two_limits, "RoutingPlugin.handler_with_two_limits", (9.0, 1)),
        (
            functools.partial(handler_with_two_limits),
            "RoutingPlugin.handler_with_two_limits",
            (9.0, 1),
        ),
    ],
)
def test_async_callable_returned_by_handler_hook_becomes_handler(
    call: Any, name: str, limits: tuple[Any, Any]
) -> None:
    class RoutingPlugin:
        @hookimpl
        def workpool_session_handler(self) -> Any:
            return functools.partial(call) if isinstance(call, functools.partial) else call

    plugins = load_plugins(RoutingPlugin())
    answer = plugins.find_handler_for_item(make_work_item())
    assert answer is not None
    assert (answer.name, answer.plugin) == (name, "RoutingPlugin")
    assert (answer.timeout, answer.max_sessions) == limits
    assert answer == plugins.find_handler_for_item(make_work_item(job="other"))


def make_observer_with_annotation(annotation: object) -> Any:
    """Return a plugin whose hook `workpool_event` annotates its argument with `annotation`."""

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
        ("SessionFinished", {SessionFinished}),
        (Event, set(get_args(Event))),
        (Any, set(get_args(Event))),
        ("object", set(get_args(Event))),
    ],
    ids=["type", "union", "Union", "text", "text not imported", "Event", "Any", "object"],
)
def test_observer_receives_event_types_in_annotation_of_its_parameter(
    annotation: object, wanted: set[type]
) -> None:
    assert load_plugins(make_observer_with_annotation(annotation)).wanted == wanted


def test_observer_without_annotation_receives_every_event_type() -> None:
    class ObserverWithoutTypeAnnotation:
        @hookimpl
        def workpool_event(self, event):  # type: ignore[no-untyped-def]  # the case
            ...

    class ObserverWithoutArgument:
        @hookimpl
        def workpool_event(self) -> None: ...

    for plugin in (ObserverWithoutTypeAnnotation(), ObserverWithoutArgument()):
        assert load_plugins(plugin).wanted == set(get_args(Event))


def test_observers_of_different_types_receive_only_their_types() -> None:
    class DrainObserver(ErrorRecorder):
        @hookimpl
        def workpool_event(self, event: DrainStarted) -> None:  # type: ignore[override]  # as in a plugin
            self.seen.append(event)

    class PluginFailureObserver(ErrorRecorder):
        @hookimpl
        def workpool_event(self, event: PluginFailed) -> None:  # type: ignore[override]  # as in a plugin
            self.seen.append(event)

    drains, failures = DrainObserver(), PluginFailureObserver()
    plugins = load_plugins(drains, failures)
    failed = PluginFailed("mail", "workpool_event", ValueError())
    for event in (FACT, failed):
        plugins.notify_observers(event)
    assert plugins.wanted == {DrainStarted, PluginFailed}
    assert (drains.seen, failures.seen) == ([FACT], [failed])


class ErrorRecorder:
    def __init__(self) -> None:
        self.seen: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.seen.append(event)


class FailingObserver:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or ValueError("secret of the plugin")
        self.calls: list[Event] = []

    @hookimpl
    def workpool_event(self, event: Event) -> None:
        self.calls.append(event)
        raise self.error


class OtherFailingObserver(FailingObserver): ...


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_error_in_handler_hook_raises_plugin_error_and_is_reported(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class FailingRoutingPlugin:
        @hookimpl
        def workpool_session_handler(self) -> None:
            raise error

    recorder, metrics = ErrorRecorder(), ErrorRecorder()
    plugins = load_plugins(FailingRoutingPlugin(), FirstPlugin(), recorder)
    plugins.metrics = metrics.workpool_event
    with pytest.raises(PluginError) as caught:
        plugins.find_handler_for_item(make_work_item())
    assert caught.value.plugin == "FailingRoutingPlugin"
    assert caught.value.__cause__ is error
    fact = PluginFailed("FailingRoutingPlugin", "workpool_session_handler", error)
    assert recorder.seen == metrics.seen == [fact]
    assert "workpool_session_handler raised" in caplog.text


def sync_function(session: Session) -> None: ...


def async_generator(session: Session) -> Awaitable[None]:
    return module_level_handler(session)


class ObjectFailingOnInspection:
    def __getattr__(self, name: str) -> object:
        raise ZeroDivisionError(name)


def test_handler_hook_that_returns_uninspectable_object_raises_plugin_error() -> None:
    class PluginWithHostileAnswer:
        @hookimpl
        def workpool_session_handler(self) -> object:
            return ObjectFailingOnInspection()

    with pytest.raises(
        PluginError, match=r"'PluginWithHostileAnswer': looking at the answer .* ZeroDivisionError"
    ):
        load_plugins(PluginWithHostileAnswer()).find_handler_for_item(make_work_item())


@pytest.mark.parametrize("answer", [sync_function, 7, CallableHandlerObject, async_generator, True])
def test_handler_hook_that_returns_no_async_callable_raises_plugin_error(answer: object) -> None:
    class PluginWithInvalidHookResult:
        @hookimpl
        def workpool_session_handler(self) -> object:
            return answer

    recorder = ErrorRecorder()
    plugins = load_plugins(PluginWithInvalidHookResult(), recorder)
    with pytest.raises(
        PluginError, match=r"'PluginWithInvalidHookResult': .* not an async callable"
    ) as caught:
        plugins.find_handler_for_item(make_work_item())
    assert recorder.seen == [
        PluginFailed("PluginWithInvalidHookResult", "workpool_session_handler", caught.value)
    ]


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError(), SystemExit(1)])
def test_failing_observer_is_reported_to_the_other_observers(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = ErrorRecorder(), type("After", (ErrorRecorder,), {})()
    failing, metrics = FailingObserver(error), ErrorRecorder()
    plugins = load_plugins(before, failing, after)
    plugins.metrics = metrics.workpool_event
    plugins.notify_observers(FACT)

    failed = PluginFailed("FailingObserver", "workpool_event", error)
    assert before.seen == [FACT, failed]
    assert after.seen == [failed, FACT]
    assert metrics.seen == [failed]
    assert failing.calls == [FACT]
    assert "'FailingObserver': workpool_event raised" in caplog.text


def test_each_of_two_failing_observers_is_reported_once_per_observed_event() -> None:
    one, two, metrics = FailingObserver(), OtherFailingObserver(), ErrorRecorder()
    plugins = load_plugins(one, two)
    plugins.metrics = metrics.workpool_event
    plugins.notify_observers(FACT)

    assert (len(one.calls), len(two.calls)) == (2, 2)
    blamed = [event.plugin for event in metrics.seen if isinstance(event, PluginFailed)]
    assert blamed == [
        "FailingObserver",
        "OtherFailingObserver",
        "OtherFailingObserver",
        "FailingObserver",
    ]


def test_log_contains_one_traceback_for_each_kind_of_observer_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failing = FailingObserver()
    plugins = load_plugins(failing)
    plugins.notify_observers(FACT)
    plugins.notify_observers(FACT)
    failing.error = KeyError("other")
    plugins.notify_observers(FACT)

    assert [bool(record.exc_info) for record in caplog.records] == [True, False, True]


def test_keyboard_interrupt_in_observer_is_not_caught() -> None:
    with pytest.raises(KeyboardInterrupt):
        load_plugins(FailingObserver(KeyboardInterrupt())).notify_observers(FACT)


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
def test_exception_in_hook_that_returns_context_manager_is_raised_unchanged(hook: str) -> None:
    def hook_implementation() -> None:
        raise LookupError("no database")

    plugins = load_plugins(
        type("Broken", (), {hook: staticmethod(hookimpl(hook_implementation))})()
    )
    argument: Any = None
    ask = (
        plugins.collect_session_contexts
        if hook == "workpool_wrap_session"
        else plugins.collect_lifespan_contexts
    )
    with pytest.raises(LookupError, match="no database"):
        ask(argument)


@pytest.mark.parametrize("hook", ["workpool_wrap_session", "workpool_lifespan"])
@pytest.mark.parametrize("answer", [7, MappingProxyType({}), open])
def test_context_hook_that_returns_no_context_manager_raises_plugin_error(
    hook: str, answer: object
) -> None:
    def hook_implementation() -> object:
        return answer

    plugins = load_plugins(
        type("Broken", (), {hook: staticmethod(hookimpl(hook_implementation))})()
    )
    argument: Any = None
    ask = (
        plugins.collect_session_contexts
        if hook == "workpool_wrap_session"
        else plugins.collect_lifespan_contexts
    )
    with pytest.raises(PluginError, match=f"'Broken': {hook} returned .* async context manager"):
        ask(argument)
