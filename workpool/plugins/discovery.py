"""Finds plugins by name: an entry point, a module, or an attribute of a module.

Installed is not active: entry points are listed without an import, and only the requested plugins
are imported. See workpool/docs/plugins.md, "Plugins and hooks".
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

from workpool.errors import PluginError
from workpool.handlers import callable_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

GROUP: Final = "workpool"


@dataclass(frozen=True, slots=True)
class InstalledPlugin:
    """An entry point of the group `workpool` in an installed distribution.

    Installing a plugin does not activate it: a setting must name it.
    """

    name: str
    value: str
    distribution: str


@dataclass(frozen=True, slots=True)
class FoundPlugin:
    """A plugin (module, class, function or object) with its name and its source."""

    name: str
    source: str
    target: object


def call_plugin_function(
    plugin: str, doing: str, call: Callable[..., T], *args: object, **kwargs: object
) -> T:
    """Call a function of a plugin; if it raises, raise a `PluginError` instead.

    The text of that error contains `doing`, which describes the call.

    CancelledError and SystemExit are exceptions of the plugin, too: a synchronous call cannot be
    cancelled, so a CancelledError from a plugin would end the calling task by mistake.
    """
    try:
        return call(*args, **kwargs)
    except (Exception, asyncio.CancelledError, SystemExit) as error:
        text = next(iter(str(error).splitlines()), "")
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise PluginError(plugin, f"{doing} raised {reason}") from error


def installed_plugins() -> list[InstalledPlugin]:
    """Return the installed entry points of the group `workpool`, sorted by name."""
    return [
        InstalledPlugin(point.name, point.value, _describe_distribution(point))
        for point in sorted(entry_points(group=GROUP), key=attrgetter("name", "value"))
    ]


def find_plugin(asked: str) -> FoundPlugin:
    """Import a plugin by the name of its entry point, `pkg.module` or `pkg.module:Name`."""
    points = [point for point in entry_points(group=GROUP) if point.name == asked]
    if len(points) > 1:
        owners = " and ".join(sorted(_describe_distribution(point) for point in points))
        raise PluginError(asked, f"is offered by {owners}; name its module instead")
    if points:
        [point] = points
        source = f"{point.value} of {_describe_distribution(point)}"
        return FoundPlugin(asked, source, _import_plugin_object(asked, point.value))
    target = _import_plugin_object(asked, asked)
    module, _, attribute = asked.partition(":")
    return FoundPlugin(attribute or module.rpartition(".")[2], asked, target)


def _import_plugin_object(asked: str, path: str) -> object:
    module, colon, attribute = path.partition(":")
    names = module.split(".") + (attribute.split(".") if colon else [])
    if not all(name.isidentifier() for name in names):
        raise PluginError(
            asked, f"is not installed, nor a module or module:Name{_format_plugin_name_hint(asked)}"
        )
    try:
        target = call_plugin_function(asked, f"importing {module}", importlib.import_module, module)
    except PluginError as failure:
        error = failure.__cause__
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise PluginError(
                asked, f"no module named {error.name!r}{_format_plugin_name_hint(asked)}"
            ) from error
        raise
    if not colon:
        return target
    try:
        return attrgetter(attribute)(target)
    except AttributeError as error:
        hint = format_similar_word_hint(attribute, dir(target))
        raise PluginError(asked, f"module {module} has no {attribute!r}{hint}") from error


def describe_plugin_object(target: object) -> FoundPlugin:
    """Return the name and the source of a plugin that was passed as an object."""
    if isinstance(target, ModuleType):
        return FoundPlugin(target.__name__.rpartition(".")[2], target.__name__, target)
    described = target if inspect.isclass(target) or inspect.isroutine(target) else type(target)
    return FoundPlugin(
        callable_name(target), f"{described.__module__}.{described.__qualname__}", target
    )


def _describe_distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"


def _format_plugin_name_hint(asked: str) -> str:
    names = sorted({point.name for point in entry_points(group=GROUP)} - {asked})
    installed = f"; installed plugins: {', '.join(names) or 'none'}"
    return format_similar_word_hint(asked, names) or installed


def format_similar_word_hint(word: str, words: Sequence[str]) -> str:
    """Return `; did you mean …?` with the most similar word; empty if no word is similar."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
