"""The active plugins of a pool, and all calls of their hooks.

Plugins are called in the order of the list, and the first answer wins. Each hook is called directly
and not through pluggy, so that an error has the name of its plugin, and one bad observer does not
stop the others. A plugin's own hook is called before its functions with `@handler`. Among these,
the more specific rule wins, whatever the order of the plugins: with
`plugins=[anything, daily_report]`, `daily_report` still gets its items. See
workpool/docs/plugins.md, "Hooks".

Everything runs on the supervisor's loop.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy

from workpool import hookspecs
from workpool.errors import PluginError
from workpool.events import PluginFailed
from workpool.handlers import Handler, callable_name, find_handler_rule, is_async_callable
from workpool.hookspecs import PROJECT, hookimpl
from workpool.log_fields import pool_logger
from workpool.plugins.discovery import call_plugin_function
from workpool.plugins.loading import SPECS, Plugin, load_and_check_plugins, make_plugin_handler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from workpool.events import Event
    from workpool.plugins.routing import Route
    from workpool.session import Session
    from workpool.wire.items import WorkItem

    Hook = tuple[str, Callable[[Any], Any]]
    NamedContext = tuple[str, AbstractAsyncContextManager[object]]

log = pool_logger(__name__)

REFUSAL_LOG_SECONDS = 60.0
"""The errors of one plugin's `workpool_admission`, which is called each second, are logged at most
this often."""


class _PluginHooks:
    """The checked hooks of a plugin, as an object that pluggy registers."""

    def __init__(self, hooks: Mapping[str, Callable[..., Any]]) -> None:
        self.__dict__.update(hooks)


class _RouteAdapter:
    """Implements the hook `workpool_session_handler` for a plugin's functions with `@handler`."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> Handler | None:
        for route in self._routes:
            if route.rule.matches_item(item):
                return route.handler
        return None


class _LastLoggedAdmissionError(NamedTuple):
    """The last error of a plugin's hook `workpool_admission` that was logged.

    Attributes:
        text: Its text; empty once the hook has succeeded.
        at: When it was logged, by `time.monotonic`.
    """

    text: str
    at: float


class Plugins:
    """The active plugins of one supervisor.

    Attributes:
        metrics: Counts the events that this object creates. The supervisor sets it before the first
            event.
        wanted: The types of events that have an observer.
    """

    def __init__(self, plugins: tuple[Plugin, ...], hooks: Mapping[str, Sequence[Hook]]) -> None:
        self.metrics: Callable[[Event], None] | None = None
        # `_reported` and `_failing` need no lock: only the thread of the event loop changes them.
        self._reported: set[tuple[str, str, type[BaseException]]] = set()
        self._failing: dict[str, _LastLoggedAdmissionError] = {}
        self._plugins = plugins
        self._choosers = hooks["workpool_session_handler"]
        self._wrappers = hooks["workpool_wrap_session"]
        self._lifespans = hooks["workpool_lifespan"]
        self._refusers = hooks["workpool_admission"]
        self._observers = _group_observers_by_event_type(plugins, hooks["workpool_event"])
        self.wanted = frozenset(self._observers)

    @classmethod
    def load(
        cls,
        objects: Sequence[object],
        names: Sequence[str],
        options: Mapping[str, Mapping[str, Any]],
        file: Path | None = None,
    ) -> Plugins:
        """Load and check the plugins, first those of `objects`, then those of `names`.

        Args:
            objects: Modules, classes, functions with `@handler`, objects; a string is a name.
            names: Entry points, `pkg.module` or `pkg.module:Name`.
            options: The keyword arguments of classes, by plugin name.
            file: The file with the tables, for errors.

        Raises:
            PluginError: A plugin cannot be used.
        """
        plugins = load_and_check_plugins((*objects, *names), options, file)
        return cls(plugins, _sort_hooks_by_calling_order(plugins))

    @property
    def can_supply_handler(self) -> bool:
        """Whether any plugin can supply a handler."""
        return bool(self._choosers)

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers that plugins define as functions with the decorator `@handler`.

        The handlers that hooks return are not included: a hook chooses its handler for each item.
        """
        return tuple(route.handler for plugin in self._plugins for route in plugin.routes)

    @property
    def has_admission_hook(self) -> bool:
        """Whether any plugin has the hook `workpool_admission`, which can refuse to claim items."""
        return bool(self._refusers)

    def admission_refusal_reason(self, supervisor: object) -> str | None:
        """Return the reason why a plugin refuses to claim items now; None if no plugin refuses.

        A hook that fails counts as a refusal; its error is logged and counted.
        """
        for plugin, hook in self._refusers:
            try:
                answer = _check_admission_hook_result(
                    plugin, call_plugin_function(plugin, "workpool_admission", hook, supervisor)
                )
                if plugin in self._failing:
                    self._failing[plugin] = self._failing[plugin]._replace(text="")
            except PluginError as failure:
                log_it = self._should_log_admission_error(plugin, str(failure))
                self._report_plugin_failure(plugin, "workpool_admission", failure, log_it=log_it)
                answer = "workpool_admission failed"
            if answer is not None:
                return f"{plugin}: {answer}"
        return None

    def _should_log_admission_error(self, plugin: str, text: str) -> bool:
        """Return whether this error of `workpool_admission` should be logged.

        If so, store it, so that the same error is not logged again.
        """
        now = time.monotonic()
        last = self._failing.get(plugin)
        if last is not None and (last.text == text or now - last.at < REFUSAL_LOG_SECONDS):
            return False
        self._failing[plugin] = _LastLoggedAdmissionError(text, now)
        return True

    def active_plugins(self) -> tuple[Plugin, ...]:
        """Return the active plugins, in the order in which they are called."""
        return self._plugins

    def find_handler_for_item(self, item: WorkItem) -> Handler | None:
        """Return the handler of the first plugin that has one for this item, or None.

        Raises:
            PluginError: A hook raised, or returned something that cannot be run. The error is
                already logged and counted. Further plugins are not called.
        """
        for plugin, hook in self._choosers:
            try:
                answer = call_plugin_function(plugin, "workpool_session_handler", hook, item)
                if answer is not None:
                    return (
                        answer
                        if isinstance(answer, Handler)
                        else _convert_to_handler(plugin, answer)
                    )
            except PluginError as failure:
                self._report_plugin_failure(plugin, "workpool_session_handler", failure)
                raise
        return None

    def collect_session_contexts(self, session: Session) -> list[NamedContext]:
        """Return the `workpool_wrap_session` contexts for this session, in the order of entering.

        An exception of a hook is not caught: it counts as an exception of the handler.
        """
        if not self._wrappers:
            return []
        return _collect_hook_contexts("workpool_wrap_session", self._wrappers, session)

    def collect_lifespan_contexts(self, supervisor: object) -> list[NamedContext]:
        """Return the `workpool_lifespan` contexts for the pool, in the order of entering.

        An exception of a hook is not caught: it stops the start.
        """
        return _collect_hook_contexts("workpool_lifespan", self._lifespans, supervisor)

    def notify_observers(self, event: Event) -> None:
        """Call the observers of this type of event, in order. Their exceptions are caught.

        Must be called on the supervisor's loop.
        """
        self._notify_observers_except_plugin(event, but=None)

    def _notify_observers_except_plugin(self, event: Event, *, but: str | None) -> None:
        for plugin, hook in self._observers.get(type(event), ()):
            if plugin == but:
                continue
            try:
                call_plugin_function(plugin, "workpool_event", hook, event)
            except PluginError as failure:
                # If an observer of `PluginFailed` fails, do not call other observers with that
                # failure: two failing observers would call each other without end.
                self._report_plugin_failure(
                    plugin, "workpool_event", failure, tell=type(event) is not PluginFailed
                )

    def _report_plugin_failure(
        self,
        plugin: str,
        hook: str,
        failure: PluginError,
        *,
        tell: bool = True,
        log_it: bool = True,
    ) -> None:
        error = failure.__cause__ or failure
        if log_it:
            kind = (plugin, hook, type(error))
            first = kind not in self._reported
            self._reported.add(kind)
            # Log one traceback for each type of error: an observer may fail ten times a session.
            log.error(
                "plugin failed: %s",
                failure,
                extra={"plugin": plugin, "error": str(failure)},
                exc_info=error if first else None,
            )
        event = PluginFailed(plugin, hook, error)
        if self.metrics is not None:
            self.metrics(event)
        if tell:
            self._notify_observers_except_plugin(event, but=plugin)


def _sort_hooks_by_calling_order(plugins: Sequence[Plugin]) -> dict[str, list[Hook]]:
    """Return the implementations of each hook in the order in which they are called.

    That order follows `tryfirst`, `trylast` and the order of the plugins.
    """
    registry = pluggy.PluginManager(PROJECT)
    registry.add_hookspecs(hookspecs)
    owners: dict[str, str] = {}
    routes = [route for plugin in plugins for route in plugin.routes]
    # pluggy calls the implementations of a hook in the reverse order of their registration, so
    # register the last plugin first.
    for plugin in reversed(plugins):
        if plugin.routes:
            adapter = registry.register(
                _RouteAdapter(_find_routes_covered_by_plugin(plugin, routes)), f"@{plugin.name}"
            )
            owners[str(adapter)] = plugin.name
        registry.register(_PluginHooks(plugin.hooks), plugin.name)
        owners[plugin.name] = plugin.name
    return {
        hook: [
            (owners[impl.plugin_name], _adapt_hook_without_argument(impl))
            for impl in reversed(getattr(registry.hook, hook).get_hookimpls())
        ]
        for hook in SPECS
    }


def _group_observers_by_event_type(
    plugins: Sequence[Plugin], hooks: Sequence[Hook]
) -> dict[type[Event], list[Hook]]:
    """Return the observers of each type of event, in the order in which the pool calls them."""
    wanted = {plugin.name: plugin.event_types for plugin in plugins}
    observers: dict[type[Event], list[Hook]] = {}
    for name, hook in hooks:
        for event_type in wanted[name]:
            observers.setdefault(event_type, []).append((name, hook))
    return observers


def _find_routes_covered_by_plugin(plugin: Plugin, routes: Iterable[Route]) -> list[Route]:
    """Return each route whose items all match one rule of `plugin`.

    `routes` are the routes of all plugins. The result has the most specific route first.
    """
    own = [route.rule for route in plugin.routes]
    refined = [route for route in routes if any(rule.covers_rule(route.rule) for rule in own)]
    return sorted(refined, key=lambda route: -len(route.rule.metadata))


def _adapt_hook_without_argument(impl: pluggy.HookImpl) -> Callable[[Any], Any]:
    function = impl.function
    return function if impl.argnames else lambda _: function()


def _check_admission_hook_result(plugin: str, answer: object) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    raise PluginError(
        plugin, f"workpool_admission returned {type(answer).__name__}, not a string or None"
    )


def _convert_to_handler(plugin: str, answer: object) -> Handler:
    # Use `call_plugin_function`: reading an attribute of `answer` runs code of the plugin, which
    # may fail.
    looking = "looking at the answer of workpool_session_handler"
    name = call_plugin_function(plugin, looking, callable_name, answer)
    # Accept a function without `async` only with `@handler`. Without that mark, it may be a wrapper
    # of an async function, which must be awaited on the loop and not run on a thread.
    rule = call_plugin_function(plugin, looking, find_handler_rule, answer)
    plain = rule is not None and rule.blocking
    if plain or call_plugin_function(plugin, looking, is_async_callable, answer):
        return make_plugin_handler(plugin, name, answer)
    raise PluginError(
        plugin,
        f"workpool_session_handler returned {type(answer).__name__} {name!r}, "
        "not an async callable, a function with @handler or a Handler",
    )


def _collect_hook_contexts(
    hook: str, calls: Sequence[Hook], argument: object
) -> list[NamedContext]:
    contexts: list[NamedContext] = []
    for plugin, call in calls:
        try:
            context = call(argument)
        except asyncio.CancelledError as error:
            # Nobody can cancel a synchronous call, so the plugin itself raised this CancelledError.
            raise PluginError(plugin, f"{hook} raised CancelledError") from error
        if isinstance(context, AbstractAsyncContextManager):
            contexts.append((plugin, context))
        elif context is not None:
            raise PluginError(
                plugin, f"{hook} returned {type(context).__name__}, not an async context manager"
            )
    return contexts
