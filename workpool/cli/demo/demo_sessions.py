"""Chooses the type and the metadata of the items that `workpool demo` enqueues.

A handler function can require a type and metadata. Each item has the type and the metadata that a
handler function of the demo's plugin requires. If a hook of the plugin chooses the handlers, the
requirements are unknown, and each item has the metadata that the user has given.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Final, NamedTuple

from workpool.errors import PluginError
from workpool.handlers import HandlerRule, find_handler_rule
from workpool.hookspecs import PROJECT
from workpool.plugins.discovery import find_plugin
from workpool.wire.protocol import SESSION

EXAMPLE: Final = "workpool.cli.demo.sample"
FIRST: Final = 4
"""Short sessions, which are in the queue before the workers start."""
FIRST_SECONDS: Final = "0.2"
SECONDS: Final = "1.5"


class DemoSession(NamedTuple):
    """A session of the demo: the type and the metadata of its item."""

    type: str
    metadata: Mapping[str, str]


def make_sessions_for_handler(
    handler: str, given: Mapping[str, str], count: int
) -> list[DemoSession]:
    """Return `count` sessions for the plugin that `handler` names.

    If the plugin has several handlers, the sessions are for each of them in turn.

    Raises:
        PluginError: The plugin cannot be imported, or takes no item with the metadata `given`.
    """
    rules = find_handler_rules(handler)
    if handler == EXAMPLE:
        return [_make_example_session(number, given) for number in range(1, count + 1)]
    if not rules:
        return [DemoSession(SESSION, given)] * count
    taken = [rule for rule in rules if not given or rule.metadata.items() <= given.items()]
    if not taken:
        wanted = " or ".join(map(str, rules))
        had = " ".join(f"{key}={value}" for key, value in given.items())
        raise PluginError(handler, f"takes {wanted}, not {had}: change --metadata or leave it out")
    sessions = [DemoSession(rule.type, given or rule.metadata) for rule in taken]
    return [sessions[number % len(sessions)] for number in range(count)]


def _make_example_session(number: int, given: Mapping[str, str]) -> DemoSession:
    seconds = FIRST_SECONDS if number <= FIRST else SECONDS
    return DemoSession(SESSION, {"text": f"session {number:02d}", "seconds": seconds, **given})


def find_handler_rules(plugin: str) -> list[HandlerRule]:
    """Return the rule of a function, or the rules of all functions of a module.

    The list is empty if a hook of the module or an instance of a class chooses the handler: only
    the workers call that hook.
    """
    target = find_plugin(plugin).target
    if not isinstance(target, ModuleType):
        rule = find_handler_rule(target)
        return [] if rule is None else [rule]
    if any(name.startswith(f"{PROJECT}_") for name in vars(target)):
        return []
    return [rule for each in vars(target).values() if (rule := find_handler_rule(each)) is not None]
