"""Loads plugins, and finds their mistakes before the pool starts.

A mistake that would prevent a hook or a handler from being called is an error at start, since
nobody would notice it later. The handlers of a module are its attributes with `@handler`, including
imported functions (a package may collect its handlers in `__init__`); each function counts once.
See workpool/docs/plugins.md, "Plugins and hooks".
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from workpool import events, hookspecs
from workpool.errors import PluginError
from workpool.handlers import (
    Handler,
    HandlerRule,
    callable_name,
    find_handler_rule,
    is_async_callable,
)
from workpool.hookspecs import PROJECT
from workpool.plugins.discovery import (
    FoundPlugin,
    call_plugin_function,
    describe_plugin_object,
    find_plugin,
    format_similar_word_hint,
    installed_plugins,
)
from workpool.plugins.routing import Route, refuse_equal_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

SPECS: Final[Mapping[str, str]] = {
    name: next(iter(inspect.signature(spec).parameters))
    for name, spec in vars(hookspecs).items()
    if name.startswith(f"{PROJECT}_")
}
"""The name of each hook, with the name of its argument."""

EVENT_TYPES: Final[frozenset[type[events.Event]]] = frozenset(get_args(events.Event))


@dataclass(frozen=True, slots=True)
class Plugin:
    """A loaded and checked plugin, with its hooks and handlers.

    Attributes:
        name: The name in logs, labels and errors, and of the settings `[workpool.plugin.NAME]`.
        source: A description of its origin.
        hooks: The implementations of hooks, by name.
        routes: The functions with `@handler`, sorted by name.
        event_types: The types of events for `workpool_event`.
    """

    name: str
    source: str
    hooks: Mapping[str, Callable[..., Any]]
    routes: tuple[Route, ...]
    event_types: frozenset[type[events.Event]] = frozenset()


def load_and_check_plugins(
    given: Sequence[object],
    options: Mapping[str, Mapping[str, Any]],
    file: Path | None = None,
) -> tuple[Plugin, ...]:
    """Load and check plugins, and return them in the same order.

    Args:
        given: The plugins; a string is the name of a plugin.
        options: The tables `[workpool.plugin.NAME]`, by name.
        file: Where the tables are, for errors.

    Raises:
        PluginError: The first mistake, with the name of its plugin.
    """
    found: list[FoundPlugin] = []
    for each in given:
        one = find_plugin(each) if isinstance(each, str) else describe_plugin_object(each)
        _refuse_duplicate_plugin(one, found)
        found.append(one)
    where = "" if file is None else f"{file}: "
    _refuse_unused_options(options, {one.name for one in found}, where)
    plugins = tuple(_build_plugin(one, options.get(one.name, {}), where) for one in found)
    refuse_equal_rules([route for plugin in plugins for route in plugin.routes])
    return plugins


def _build_plugin(found: FoundPlugin, options: Mapping[str, Any], where: str) -> Plugin:
    target = _instantiate_plugin_class(found, options, where)
    rule = find_handler_rule(target)
    if rule is not None:
        route = _make_handler_route(found.name, callable_name(target), target, rule)
        return Plugin(found.name, found.source, {}, (route,))
    hooks: dict[str, Callable[..., Any]] = {}
    routes: dict[object, Route] = {}
    for name, member in _list_possible_hooks_and_handlers(target):
        if _is_hook(found.name, name, member):
            hooks[name] = member
        rule = find_handler_rule(member)
        if rule is not None:
            route = _make_handler_route(found.name, name, member, rule)
            routes.setdefault(getattr(member, "__func__", member), route)
    if not hooks and not routes:
        raise PluginError(found.name, _describe_lack_of_hooks_and_handlers(target))
    observer = hooks.get("workpool_event")
    event_types = _find_observed_event_types(found.name, observer) if observer else frozenset()
    return Plugin(found.name, found.source, hooks, tuple(routes.values()), event_types)


def _instantiate_plugin_class(found: FoundPlugin, options: Mapping[str, Any], where: str) -> object:
    table = f"{where}[workpool.plugin.{found.name}]"
    if not inspect.isclass(found.target):
        if options:
            raise PluginError(found.name, f"takes no settings, only a class does: remove {table}")
        return found.target
    try:
        signature = inspect.signature(found.target)
        _refuse_unknown_options(found.name, table, signature, options)
        signature.bind(**options)
    except TypeError as error:
        raise PluginError(found.name, f"{table}: {error}") from error
    # A class that is written in C may have no signature. Then its constructor checks the options.
    except ValueError:
        pass
    return call_plugin_function(found.name, f"creating it with {table}", found.target, **options)


def _refuse_unknown_options(
    plugin: str, table: str, signature: inspect.Signature, options: Mapping[str, Any]
) -> None:
    kinds = {each.kind for each in signature.parameters.values()}
    for name in options:
        if name not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            hint = format_similar_word_hint(name, list(signature.parameters))
            raise PluginError(plugin, f"{table}: {name}: no such option{hint}")


def _list_possible_hooks_and_handlers(target: object) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each attribute that may be a hook or a handler.

    Properties are skipped, so that their code does not run.
    """
    for name in dir(target):
        member = inspect.getattr_static(target, name, None)
        if isinstance(member, FunctionType | MethodType | classmethod | staticmethod):
            yield name, getattr(target, name)
        elif name.startswith(f"{PROJECT}_") and not isinstance(member, ModuleType):
            yield name, member


def _describe_lack_of_hooks_and_handlers(target: object) -> str:
    if inspect.isroutine(target):
        return "is a function without @handler"
    message = "has no hook marked @hookimpl and no function with @handler"
    if inspect.ismodule(target):
        for member in vars(target).values():
            if inspect.isclass(member) and _has_hook_or_handler(member):
                return f"{message}; did you mean '{target.__name__}:{member.__name__}'?"
    return message


def _has_hook_or_handler(target: type) -> bool:
    return any(
        hasattr(member, f"{PROJECT}_impl") or find_handler_rule(member) is not None
        for _, member in _list_possible_hooks_and_handlers(target)
    )


def _is_hook(plugin: str, name: str, member: Any) -> bool:
    marks = getattr(member, f"{PROJECT}_impl", None)
    if marks is None and not name.startswith(f"{PROJECT}_"):
        return False
    if name not in SPECS:
        raise PluginError(
            plugin, f"{name} is not a hook{format_similar_word_hint(name, list(SPECS))}"
        )
    if marks is None:
        raise PluginError(plugin, f"{name} is not marked with @hookimpl")
    if marks.get("wrapper") or marks.get("hookwrapper") or marks.get("specname"):
        raise PluginError(plugin, f"{name}: of hookimpl's options only tryfirst and trylast work")
    if inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member):
        raise PluginError(
            plugin,
            f"{name} is `async def`; a hook is a plain `def` that may return something async",
        )
    _check_hook_parameters(plugin, name, list(inspect.signature(member).parameters.values()))
    return True


def _check_hook_parameters(plugin: str, hook: str, parameters: list[inspect.Parameter]) -> None:
    # Refuse hooks whose parameter is `*args` or has a default value: pluggy would pass no argument.
    only = parameters[0] if len(parameters) == 1 else None
    if parameters and (
        only is None
        or only.name != SPECS[hook]
        or only.kind is not only.POSITIONAL_OR_KEYWORD
        or only.default is not only.empty
    ):
        raise PluginError(plugin, f"{hook} must take exactly ({SPECS[hook]}), without a default")


def _find_observed_event_types(
    plugin: str, observer: Callable[..., Any]
) -> frozenset[type[events.Event]]:
    """Return the event types that the annotation of the observer's argument names.

    An observer without an annotation observes all types.
    A name that the plugin imports for type checkers only is looked up in `workpool.events`.
    """
    parameters = inspect.signature(observer).parameters.values()
    annotations = {
        each.name: each.annotation for each in parameters if each.annotation is not each.empty
    }
    names = vars(events) | getattr(inspect.unwrap(observer), "__globals__", {})
    try:
        hints = get_type_hints(SimpleNamespace(__annotations__=annotations), names)
    except Exception as error:
        raise PluginError(
            plugin, f"workpool_event: its annotation cannot be read: {error}"
        ) from error
    hint = hints.get("event", Any)
    if hint in {Any, object}:
        return EVENT_TYPES
    event_types = frozenset(get_args(hint) or (hint,))
    if not event_types <= EVENT_TYPES:
        raise PluginError(plugin, f"workpool_event: {hint} is no type of event of workpool.events")
    return event_types


def _make_handler_route(plugin: str, name: str, call: Any, rule: HandlerRule) -> Route:
    if is_async_callable(call) is rule.blocking:
        outer = "an `async def`" if rule.blocking else "a plain `def`"
        raise PluginError(
            plugin,
            f"{name} is {outer} around a handler of the other kind; "
            "put @handler above the decorator",
        )
    try:
        inspect.signature(call).bind(None)
    except TypeError as error:
        raise PluginError(
            plugin, f"{name} must be callable with one argument, the session: {error}"
        ) from error
    return Route(rule, make_plugin_handler(plugin, name, call))


def make_plugin_handler(plugin: str, name: str, call: Any) -> Handler:
    """Return a `Handler` that runs the callable `call` of a plugin.

    The decorator `@handler` of `call` sets the timeout and the other limits. A callable that is not
    async is a plain handler.
    """
    rule = find_handler_rule(call)
    return Handler(
        name=f"{plugin}.{name}",
        call=call,
        blocking=not is_async_callable(call),
        timeout=rule.timeout if rule else None,
        max_sessions=rule.max_sessions if rule else None,
        reserved_sessions=rule.reserved_sessions if rule else 0,
        stall_timeout=rule.stall_timeout if rule else None,
        retry=rule.retry if rule else None,
        plugin=plugin,
    )


def _refuse_duplicate_plugin(found: FoundPlugin, before: Sequence[FoundPlugin]) -> None:
    for other in before:
        if other.target is found.target:
            raise PluginError(found.name, f"is given twice: {other.source}, {found.source}")
        if other.name == found.name:
            raise PluginError(
                found.name, f"is the name of two plugins: {other.source}, {found.source}"
            )


def _refuse_unused_options(options: Mapping[str, object], active: set[str], where: str) -> None:
    # Accept the options of any installed plugin, even if it is not active: pools with different
    # plugins may share a TOML file.
    known = active | {point.name for point in installed_plugins()}
    for name in options:
        if name not in known:
            hint = format_similar_word_hint(name, sorted(known))
            raise PluginError(
                name, f"{where}[workpool.plugin.{name}] is for no active plugin{hint}"
            )
