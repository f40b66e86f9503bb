"""The decorator `@handler`, its options `HandlerRule` and `Retry`, and the pool's `Handler`.

The decorator only adds an attribute to the function, which stays callable in a test without a pool.
`workpool.plugins` turns rules into routes. This module registers nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, overload

from workpool.wire.protocol import HEALTHCHECK, SESSION

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from workpool.blocking_session import BlockingSession
    from workpool.json_value import JSON
    from workpool.session import Session
    from workpool.wire.items import WorkItem

    AsyncCall: TypeAlias = Callable[[Session], Awaitable[JSON]]
    PlainCall: TypeAlias = Callable[[BlockingSession], JSON]
    Running: TypeAlias = Coroutine[Any, Any, JSON]
    HandlerFunction: TypeAlias = (
        Callable[[Session], Running]
        | Callable[[Any, Session], Running]
        | PlainCall
        | Callable[[Any, BlockingSession], JSON]
    )
    """A function, or a function of a class body, whose first argument is `self` or `cls`."""

Function = TypeVar("Function", bound="HandlerFunction")

_MARK: Final = "__workpool_handler__"
_ANY: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The conditions for calling a handler again in the same run after it raised an error.

    The delay before a retry is random, between 0 and a ceiling that doubles with each retry.
    `Release` and the errors of a session that the pool no longer holds are never retried.

    Attributes:
        on: The class of errors, or the classes, that are retried. An exception group counts if it
            contains only such errors.
        times: The number of retries at most.
        backoff: The ceiling of the first delay, in seconds.
        backoff_max: The ceiling that no delay exceeds, in seconds.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument that can never work.
    """

    on: type[Exception] | tuple[type[Exception], ...]
    times: int = 3
    backoff: float = 1.0
    backoff_max: float = 60.0

    def __post_init__(self) -> None:
        classes: tuple[object, ...] = self.on if isinstance(self.on, tuple) else (self.on,)
        if not all(isinstance(each, type) and issubclass(each, Exception) for each in classes):
            raise TypeError("Retry: on must be a subclass of Exception, or a tuple of them")
        if not classes:
            raise ValueError("Retry: on must name an error")
        _check_whole_number("Retry: times", self.times)
        _check_number_at_least_one("Retry: times", self.times)
        for name, seconds in (("backoff", self.backoff), ("backoff_max", self.backoff_max)):
            _check_positive_seconds(f"Retry: {name}", seconds)
        if self.backoff > self.backoff_max:
            raise ValueError("Retry: backoff must not be more than backoff_max")


@dataclass(frozen=True, slots=True)
class HandlerRule:
    """The arguments of `@handler`: the items that the function takes, and its limits."""

    type: str
    metadata: Mapping[str, str]
    timeout: float | None
    max_sessions: int | None
    reserved_sessions: int = 0
    stall_timeout: float | None = None
    retry: Retry | None = None
    blocking: bool = False

    def matches_item(self, item: WorkItem) -> bool:
        """Return whether the item has the rule's type and every metadata pair of the rule."""
        return self.type == item.type and self.metadata.items() <= item.metadata.items()

    def covers_rule(self, other: HandlerRule) -> bool:
        """Return whether this rule matches every item that the rule `other` matches."""
        return self.type == other.type and self.metadata.items() <= other.metadata.items()

    def __str__(self) -> str:
        asked = [f"type={self.type}", *(f"{key}={self.metadata[key]}" for key in self.metadata)]
        return " ".join(asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """A function that the pool can run for an item, with its label and its limits.

    Two handlers are equal if their labels and limits are. So `max_sessions` counts for each label,
    and a hook may return a new closure or `functools.partial` for each item.

    Attributes:
        name: The label `plugin.function` of logs and metrics.
        call: Takes the session. Its result or exception decides the outcome.
        blocking: `call` is a plain function: it is called on a thread, with a `BlockingSession`.
        timeout: Seconds for one session; None: the setting `session_timeout`.
        max_sessions: Sessions that may run at once in this pool; None: no limit.
        reserved_sessions: Slots of the pool that sessions of other handlers leave free for it.
        stall_timeout: Seconds without progress; None: the setting `stall_timeout`.
        retry: When it is called again after an error; None: never.
        plugin: The name of its plugin.
    """

    name: str
    call: AsyncCall | PlainCall = field(compare=False)
    blocking: bool = False
    timeout: float | None = None
    max_sessions: int | None = None
    reserved_sessions: int = 0
    stall_timeout: float | None = None
    retry: Retry | None = None
    plugin: str


@overload
def handler(function: Function, /) -> Function: ...


@overload
def handler(
    *,
    type: str = ...,
    metadata: Mapping[str, str] = ...,
    timeout: float | None = ...,
    max_sessions: int | None = ...,
    reserved_sessions: int = ...,
    stall_timeout: float | None = ...,
    retry: Retry | None = ...,
) -> Callable[[Function], Function]: ...


def handler(  # noqa: PLR0913 - the arguments are documented one by one
    function: Function | None = None,
    /,
    *,
    type: str = SESSION,  # noqa: A002 - named after `data.type`
    metadata: Mapping[str, str] = _ANY,
    timeout: float | None = None,
    max_sessions: int | None = None,
    reserved_sessions: int = 0,
    stall_timeout: float | None = None,
    retry: Retry | None = None,
) -> Function | Callable[[Function], Function]:
    """Mark a function or method as the handler of items with a certain type and metadata.

    An `async def` takes a `Session` and runs on the event loop. A plain `def` takes a
    `BlockingSession` and runs on a thread.

    An item matches when its `data.type` is `type` and its metadata holds every pair of `metadata`;
    the rule with more pairs goes first. Use it bare (`@handler`: every session) or with arguments.

    Args:
        function: The function itself, when used bare.
        type: The item's `data.type`.
        metadata: Pairs that the item's metadata must hold.
        timeout: Seconds after which the handler is cancelled, retries included; None: the setting
            `session_timeout`.
        max_sessions: How many of its sessions this pool runs at once; None: as many as it has
            slots for. An item beyond that waits, unacknowledged, until one of them ends or the item
            is about to be delivered again.
        reserved_sessions: How many slots of the pool sessions of other handlers leave free.
        stall_timeout: Seconds without progress after which the handler is cancelled; None: the
            setting `stall_timeout`.
        retry: When it is called again after an error; None: never.

    Raises:
        TypeError: No function, a generator, marked twice, or an argument of the wrong type.
        ValueError: An argument that can never work.
    """

    def decorate(function: Function) -> Function:
        name = getattr(function, "__qualname__", repr(function))
        _check_handler_function(name, function)
        _check_type_and_metadata(name, type, metadata)
        _check_positive_seconds_or_none(f"@handler: timeout of {name}", timeout)
        _check_positive_seconds_or_none(f"@handler: stall_timeout of {name}", stall_timeout)
        _check_session_limits(name, max_sessions, reserved_sessions)
        if retry is not None and not isinstance(retry, Retry):
            raise TypeError(f"@handler: retry of {name} must be a Retry, or None")
        match = MappingProxyType(dict(metadata))
        rule = HandlerRule(
            *(type, match, timeout, max_sessions, reserved_sessions, stall_timeout, retry),
            blocking=not inspect.iscoroutinefunction(function),
        )
        setattr(function, _MARK, rule)
        return function

    return decorate if function is None else decorate(function)


def find_handler_rule(call: object) -> HandlerRule | None:
    """Return the `@handler` rule of a function, method or `functools.partial`; None without one."""
    inner = _unwrap_function(call)
    # Read the attribute of functions only: reading an attribute of another object may run its code.
    rule = getattr(inner, _MARK, None) if inspect.isroutine(inner) else None
    return rule if isinstance(rule, HandlerRule) else None


def callable_name(call: object) -> str:
    """Return the name of a function, or the class name of another callable, for labels."""
    inner = _unwrap_function(call)
    return str(getattr(inner, "__name__", inner.__class__.__name__))


def is_async_callable(call: object) -> bool:
    """Return whether calling the object returns a coroutine.

    The object may be a function, a `functools.partial` or an object with `__call__`.
    """
    inner = _unwrap_function(call)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(
        getattr(inner.__class__, "__call__", None)  # noqa: B004 - it must be async, not only callable
    )


def _unwrap_function(call: object) -> object:
    while isinstance(call, functools.partial):
        call = call.func
    return call


def _check_handler_function(name: str, function: object) -> None:
    if inspect.isclass(function):
        raise TypeError(f"@handler: {name} is a class; mark its methods instead")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"@handler: {name} is a generator; a handler must not yield")
    if not inspect.isfunction(function):
        raise TypeError(
            f"@handler: {name} is not a function; mark the function itself, "
            "below any other decorator, and give arguments by keyword"
        )
    is_async = inspect.iscoroutinefunction
    if is_async(inspect.unwrap(function)) and not is_async(function):
        raise TypeError(
            f"@handler: {name} is a plain `def` around an `async def`; "
            "the decorator below @handler must give an `async def`"
        )
    if find_handler_rule(function) is not None:
        raise TypeError(f"@handler: {name} is marked twice; one function has one rule")


def _check_type_and_metadata(name: str, type_: object, metadata: object) -> None:
    if not isinstance(type_, str):
        raise TypeError(f"@handler: type of {name} must be a string")
    if not type_:
        raise ValueError(f"@handler: type of {name} must not be empty")
    if type_ == HEALTHCHECK:
        raise ValueError(
            f"@handler: type of {name} must not be {HEALTHCHECK!r}: the pool answers those itself"
        )
    if not isinstance(metadata, Mapping) or not all(
        isinstance(text, str) for pair in metadata.items() for text in pair
    ):
        raise TypeError(f"@handler: metadata of {name} must map strings to strings")


def _check_positive_seconds_or_none(what: str, seconds: object) -> None:
    if seconds is not None:
        _check_positive_seconds(what, seconds, ", or None")


def _check_positive_seconds(what: str, seconds: object, otherwise: str = "") -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be a number of seconds{otherwise}")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{what} must be more than 0 seconds and finite")


def _check_session_limits(name: str, max_sessions: int | None, reserved_sessions: int) -> None:
    if max_sessions is not None:
        what = f"@handler: max_sessions of {name}"
        _check_whole_number(what, max_sessions, ", or None")
        _check_number_at_least_one(what, max_sessions)
    _check_whole_number(f"@handler: reserved_sessions of {name}", reserved_sessions)
    if reserved_sessions < 0:
        raise ValueError(f"@handler: reserved_sessions of {name} must not be negative")
    if max_sessions is not None and reserved_sessions > max_sessions:
        raise ValueError(
            f"@handler: reserved_sessions of {name} must not exceed its max_sessions, "
            f"{max_sessions}"
        )


def _check_whole_number(what: str, number: object, otherwise: str = "") -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{what} must be a whole number{otherwise}")


def _check_number_at_least_one(what: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{what} must be at least 1")
