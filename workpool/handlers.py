"""The decorator `@handler`, its rule, and `Handler`, which the pool runs.

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

    from workpool.json_value import JSON
    from workpool.session import Session
    from workpool.wire.items import WorkItem

    Running: TypeAlias = Coroutine[Any, Any, JSON]
    HandlerFunction: TypeAlias = Callable[[Session], Running] | Callable[[Any, Session], Running]
    """A function, or a function of a class body, whose first argument is `self` or `cls`."""

Function = TypeVar("Function", bound="HandlerFunction")

_MARK: Final = "__workpool_handler__"
_ANY: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HandlerRule:
    """The items that a decorated function takes, and its limits."""

    type: str
    metadata: Mapping[str, str]
    timeout: float | None
    max_sessions: int | None
    reserved_sessions: int = 0
    stall_timeout: float | None = None

    def matches(self, item: WorkItem) -> bool:
        """Whether the item has this type and at least this metadata."""
        return self.type == item.type and self.metadata.items() <= item.metadata.items()

    def covers(self, other: HandlerRule) -> bool:
        """Whether every item that `other` matches is matched by this rule too."""
        return self.type == other.type and self.metadata.items() <= other.metadata.items()

    def __str__(self) -> str:
        asked = [f"type={self.type}", *(f"{key}={self.metadata[key]}" for key in self.metadata)]
        return " ".join(asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """The function that the pool runs for an item, as the plugins chose it.

    Two handlers are equal if their labels and limits are. So `max_sessions` counts for each label,
    and a hook may return a new closure or `functools.partial` for each item.

    Attributes:
        name: The label `plugin.function` of logs and metrics.
        call: Takes the session. Its result or exception decides the outcome.
        timeout: Seconds for one session; None: the setting `session_timeout`.
        max_sessions: Sessions that may run at once in this pool; None: no limit.
        reserved_sessions: Slots of the pool that sessions of other handlers leave free for it.
        stall_timeout: Seconds without progress; None: the setting `stall_timeout`.
        plugin: The name of its plugin.
    """

    name: str
    call: Callable[[Session], Awaitable[JSON]] = field(compare=False)
    timeout: float | None = None
    max_sessions: int | None = None
    reserved_sessions: int = 0
    stall_timeout: float | None = None
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
) -> Function | Callable[[Function], Function]:
    """Mark an async function or method as the handler of the items that match.

    An item matches when its `data.type` is `type` and its metadata holds every pair of `metadata`;
    the rule with more pairs goes first. Use it bare (`@handler`: every session) or with arguments.

    Args:
        function: The function itself, when used bare.
        type: The item's `data.type`.
        metadata: Pairs that the item's metadata must hold.
        timeout: Seconds after which the handler is cancelled; None: the setting `session_timeout`.
        max_sessions: How many of its sessions this pool runs at once; None: as many as it has
            slots for. An item beyond that waits, unacknowledged, until one of them ends or the item
            is about to be delivered again.
        reserved_sessions: How many slots of the pool sessions of other handlers leave free.
        stall_timeout: Seconds without progress after which the handler is cancelled; None: the
            setting `stall_timeout`.

    Raises:
        TypeError: Not an `async def` function, marked twice, or an argument of the wrong type.
        ValueError: An argument that can never work.
    """

    def mark(function: Function) -> Function:
        name = getattr(function, "__qualname__", repr(function))
        _check_function(name, function)
        _check_match(name, type, metadata)
        _check_seconds(name, "timeout", timeout)
        _check_seconds(name, "stall_timeout", stall_timeout)
        _check_slots(name, max_sessions, reserved_sessions)
        match = MappingProxyType(dict(metadata))
        rule = HandlerRule(
            type, match, timeout, max_sessions, reserved_sessions, stall_timeout=stall_timeout
        )
        setattr(function, _MARK, rule)
        return function

    return mark if function is None else mark(function)


def rule_of(call: object) -> HandlerRule | None:
    """Return the rule of a function, a method, or the function of a `functools.partial`, if any."""
    inner = _innermost(call)
    # Functions only: a module may import lazily, and an object may have any attribute.
    rule = getattr(inner, _MARK, None) if inspect.isroutine(inner) else None
    return rule if isinstance(rule, HandlerRule) else None


def name_of(call: object) -> str:
    """Return the function part of a label: a function's name, or the class of an object."""
    inner = _innermost(call)
    return str(getattr(inner, "__name__", inner.__class__.__name__))


def is_async_callable(call: object) -> bool:
    """Return whether a call gives a coroutine: async functions, methods, partials, `__call__`."""
    inner = _innermost(call)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(
        getattr(inner.__class__, "__call__", None)  # noqa: B004 - it must be async, not only callable
    )


def _innermost(call: object) -> object:
    while isinstance(call, functools.partial):
        call = call.func
    return call


def _check_function(name: str, function: object) -> None:
    if inspect.isclass(function):
        raise TypeError(f"@handler: {name} is a class; mark its async methods instead")
    if inspect.isasyncgenfunction(function):
        raise TypeError(f"@handler: {name} is an async generator; a handler must not yield")
    if not inspect.isfunction(function):
        raise TypeError(
            f"@handler: {name} is not a function; mark the `async def` itself, "
            "below any other decorator, and give arguments by keyword"
        )
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@handler: {name} is a plain `def`; a handler must be an `async def`")
    if rule_of(function) is not None:
        raise TypeError(f"@handler: {name} is marked twice; one function has one rule")


def _check_match(name: str, type_: object, metadata: object) -> None:
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


def _check_seconds(name: str, argument: str, seconds: object) -> None:
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"@handler: {argument} of {name} must be a number of seconds, or None")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"@handler: {argument} of {name} must be more than 0 seconds and finite")


def _check_slots(name: str, max_sessions: int | None, reserved_sessions: int) -> None:
    if max_sessions is not None:
        _check_whole_number(name, "max_sessions", max_sessions, ", or None")
        if max_sessions < 1:
            raise ValueError(f"@handler: max_sessions of {name} must be at least 1")
    _check_whole_number(name, "reserved_sessions", reserved_sessions)
    if reserved_sessions < 0:
        raise ValueError(f"@handler: reserved_sessions of {name} must not be negative")
    if max_sessions is not None and reserved_sessions > max_sessions:
        raise ValueError(
            f"@handler: reserved_sessions of {name} must not exceed its max_sessions, "
            f"{max_sessions}"
        )


def _check_whole_number(name: str, argument: str, number: object, otherwise: str = "") -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"@handler: {argument} of {name} must be a whole number{otherwise}")
