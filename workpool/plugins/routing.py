"""Routes: a route connects a rule with the handler for the items that match the rule.

Two equal rules are an error across plugins, too: one of them would never run. See
workpool/docs/plugins.md, "Plugins and hooks".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workpool.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workpool.handlers import Handler, HandlerRule


@dataclass(frozen=True, slots=True)
class Route:
    """A rule, and the handler for the items that match the rule."""

    rule: HandlerRule
    handler: Handler


def refuse_equal_rules(routes: Sequence[Route]) -> None:
    """Check that no two handlers have the same rule, even in different plugins.

    Raises:
        PluginError: Two handlers have the same rule.
    """
    for index, route in enumerate(routes):
        for other in routes[:index]:
            if other.rule.covers_rule(route.rule) and route.rule.covers_rule(other.rule):
                raise PluginError(
                    route.handler.plugin,
                    f"{route.handler.name} and {other.handler.name} have the same rule "
                    f"({route.rule}); one of them would never run",
                )
