"""The decorator `@handler`, and the equality of `Handler` objects."""

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from workpool.handlers import (
    Handler,
    Retry,
    callable_name,
    find_handler_rule,
    handler,
    is_async_callable,
)
from workpool.session import Session

Signature = Callable[[Session], Coroutine[Any, Any, dict[str, str]]]


async def handler_without_limits(session: Session) -> dict[str, str]:
    return {"id": session.id}


def make_handler_function() -> Signature:
    async def handler_function(session: Session) -> dict[str, str]:
        return {"id": session.id}

    return handler_function


class CallableHandler:
    async def __call__(self, session: Session) -> None: ...

    async def method_handler(self, session: Session) -> None: ...


def test_handler_without_arguments_takes_every_session() -> None:
    function = make_handler_function()
    # This annotation makes mypy check that the decorator keeps the signature.
    marked: Signature = handler(function)
    assert marked is function
    rule = find_handler_rule(function)
    assert rule is not None
    assert (rule.type, dict(rule.metadata)) == ("session", {})
    assert (rule.timeout, rule.max_sessions) == (None, None)


def test_arguments_of_handler_decorator_become_fields_of_handler_rule() -> None:
    function = make_handler_function()
    mark = handler(type="build", metadata={"job": "a"}, timeout=1.5, max_sessions=2)
    marked: Signature = mark(function)
    assert marked is function
    rule = find_handler_rule(function)
    assert rule is not None
    assert (rule.type, dict(rule.metadata)) == ("build", {"job": "a"})
    assert (rule.timeout, rule.max_sessions) == (1.5, 2)


def test_later_change_of_metadata_argument_does_not_change_handler_rule() -> None:
    metadata = {"job": "a"}
    function = handler(metadata=metadata)(make_handler_function())
    metadata["job"] = "b"
    rule = find_handler_rule(function)
    assert rule is not None
    assert rule.metadata["job"] == "a"


def test_bound_method_has_same_handler_rule_as_its_decorated_function() -> None:
    class ClassWithHandlerMethod:
        @handler(max_sessions=3)
        async def handle_daily_report(self, session: Session) -> None: ...

    rule = find_handler_rule(ClassWithHandlerMethod().handle_daily_report)
    assert rule is not None
    assert rule.max_sessions == 3


def test_functools_partial_has_same_handler_rule_as_function_that_it_wraps() -> None:
    assert (
        find_handler_rule(functools.partial(functools.partial(handler(make_handler_function()))))
        is not None
    )
    assert find_handler_rule(functools.partial(make_handler_function())) is None


def test_object_with_dynamic_attributes_does_not_count_as_decorated_handler() -> None:
    class ObjectWithEveryAttribute:
        def __getattr__(self, name: str) -> str:
            return name

    assert find_handler_rule(ObjectWithEveryAttribute()) is None


def sync_function(session: Session) -> None: ...


def generator_function(session: Session) -> Any:
    yield session


@functools.wraps(handler_without_limits)
def sync_wrapper_of_async(session: Session) -> Any:
    return handler_without_limits(session)


async def async_generator_function(session: Session) -> Any:
    yield session


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (generator_function, "generator_function is a generator"),
        (async_generator_function, "async_generator_function is a generator"),
        (sync_wrapper_of_async, "handler_without_limits is a plain `def` around an `async def`"),
        (CallableHandler, "CallableHandler is a class"),
        (CallableHandler(), "is not a function"),
        (CallableHandler().method_handler, r"CallableHandler.method_handler is not a function"),
        (staticmethod(handler_without_limits), "handler_without_limits is not a function"),
        (functools.partial(handler_without_limits), "is not a function"),
        ("session", "'session' is not a function; .* by keyword"),
    ],
)
def test_decorating_anything_but_an_async_function_is_refused(function: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        handler(function)
    with pytest.raises(TypeError, match=sentence):
        handler(metadata={})(function)


def test_handler_decorator_applied_twice_to_one_function_raises_type_error() -> None:
    function = handler(metadata={"job": "a"})(make_handler_function())
    with pytest.raises(TypeError, match="handler_function is marked twice"):
        handler(metadata={"job": "b"})(function)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"type": 1}, TypeError, "type of .*handler_function must be a string"),
        ({"type": ""}, ValueError, "type of .*handler_function must not be empty"),
        ({"type": "healthcheck"}, ValueError, "the pool answers those itself"),
        (
            {"metadata": None},
            TypeError,
            "metadata of .*handler_function must map strings to strings",
        ),
        ({"metadata": ["job"]}, TypeError, "metadata"),
        ({"metadata": {"job": 1}}, TypeError, "metadata"),
        ({"metadata": {1: "job"}}, TypeError, "metadata"),
        ({"timeout": "60"}, TypeError, "timeout of .*handler_function must be a number of seconds"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"timeout": 0}, ValueError, "timeout of .*handler_function must be more than 0"),
        ({"timeout": -1.0}, ValueError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": float("inf")}, ValueError, "timeout"),
        (
            {"max_sessions": 1.0},
            TypeError,
            "max_sessions of .*handler_function must be a whole number",
        ),
        ({"max_sessions": True}, TypeError, "max_sessions"),
        ({"max_sessions": 0}, ValueError, "max_sessions of .*handler_function must be at least 1"),
        ({"reserved_sessions": None}, TypeError, "reserved_sessions of .* must be a whole"),
        (
            {"reserved_sessions": -1},
            ValueError,
            "reserved_sessions of .*must not be negative",
        ),
        (
            {"reserved_sessions": 3, "max_sessions": 2},
            ValueError,
            "reserved_sessions of .*handler_function must not exceed its max_sessions, 2",
        ),
        ({"retry": 3}, TypeError, "retry of .*handler_function must be a Retry"),
    ],
)
def test_error_about_invalid_argument_of_handler_decorator_names_that_argument(
    arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    function = make_handler_function()
    with pytest.raises(error, match=sentence):
        handler(**arguments)(function)
    assert find_handler_rule(function) is None


@pytest.mark.parametrize(
    ("call", "name", "is_async"),
    [
        (handler_without_limits, "handler_without_limits", True),
        (functools.partial(handler_without_limits), "handler_without_limits", True),
        (CallableHandler().method_handler, "method_handler", True),
        (functools.partial(CallableHandler().method_handler), "method_handler", True),
        (CallableHandler(), "CallableHandler", True),
        (functools.partial(CallableHandler()), "CallableHandler", True),
        (sync_function, "sync_function", False),
        (async_generator_function, "async_generator_function", False),
        (functools.partial(sync_function), "sync_function", False),
        (CallableHandler, "CallableHandler", False),
        (7, "int", False),
    ],
)
def test_async_callables_are_recognised_and_named(
    call: object, name: str, *, is_async: bool
) -> None:
    assert callable_name(call) == name
    assert is_async_callable(call) is is_async


def test_handlers_with_equal_names_and_limits_are_equal() -> None:
    def make_handler(call: Any, **limits: Any) -> Handler:
        return Handler(name="reports.daily_report", plugin="reports", call=call, **limits)

    one = make_handler(make_handler_function(), max_sessions=2)
    assert one == make_handler(make_handler_function(), max_sessions=2)
    assert hash(one) == hash(
        make_handler(functools.partial(handler_without_limits), max_sessions=2)
    )
    assert one != make_handler(make_handler_function(), max_sessions=3)


def test_handler_decorator_has_exactly_the_documented_arguments() -> None:
    parameters = inspect.signature(handler).parameters
    assert list(parameters) == [
        "function",
        "type",
        "metadata",
        "timeout",
        "max_sessions",
        "reserved_sessions",
        "stall_timeout",
        "retry",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"on": ()}, ValueError, "on must name an error"),
        ({"on": ValueError()}, TypeError, "on must be a subclass of Exception"),
        ({"on": [ValueError]}, TypeError, "on must be a subclass of Exception"),
        ({"on": (ValueError, KeyboardInterrupt)}, TypeError, "on must be a subclass of Exception"),
        ({"times": 0}, ValueError, "times must be at least 1"),
        ({"times": 1.5}, TypeError, "times must be a whole number"),
        ({"backoff": 0}, ValueError, "backoff must be more than 0"),
        ({"backoff_max": float("inf")}, ValueError, "backoff_max must be more than 0 .* finite"),
        ({"backoff": "1"}, TypeError, "backoff must be a number of seconds"),
        ({"backoff": 61}, ValueError, "backoff must not be more than backoff_max"),
    ],
)
def test_error_about_wrong_argument_of_retry_names_that_argument(
    arguments: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=f"Retry: {sentence}"):
        Retry(**{"on": ConnectionError} | arguments)


def test_handler_rule_contains_retry_settings_of_decorator() -> None:
    retry = Retry(on=(ConnectionError, TimeoutError), times=5)
    rule = find_handler_rule(handler(retry=retry)(make_handler_function()))
    assert rule is not None
    assert rule.retry == retry
