"""`workpool plugins`: the installed and the active plugins.

See workpool/docs/plugins.md, "Plugins and hooks".
"""

from typing import Any, Final

from workpool.cli import exits
from workpool.cli.flags import (
    Config,
    Json,
    PluginNames,
    add_current_directory_to_path,
    read_command_settings,
)
from workpool.cli.help_text import format_examples_section
from workpool.cli.output import print_json, print_rows
from workpool.plugins import Plugin, Plugins, installed_plugins
from workpool.settings import Settings

EXAMPLES: Final = format_examples_section("workpool plugins", "workpool plugins reports --json")


def load_plugins(settings: Settings) -> Plugins:
    """Load the plugins that `workpool run` would load with these settings.

    Raises:
        PluginError: A plugin cannot be used.
    """
    add_current_directory_to_path()
    return Plugins.load((), settings.plugins, settings.plugin_options, settings.config_file)


def plugins(plugins: PluginNames = None, config: Config = None, json: Json = False) -> None:
    """Show the installed and the active plugins.

    The active ones are shown with their hooks and handlers. Installed is not active: name a
    plugin here, or in the setting `plugins`.
    """
    with exits.exit_on_error():
        loaded = load_plugins(read_command_settings(config, plugins=plugins)).active_plugins()
    found = {
        "available": [
            {"name": one.name, "value": one.value, "distribution": one.distribution}
            for one in installed_plugins()
        ],
        "active": [_describe_plugin(plugin) for plugin in loaded],
    }
    if json:
        print_json(found)
    else:
        _print_plugins(found)


def _describe_plugin(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "source": plugin.source,
        "hooks": sorted(plugin.hooks),
        "handlers": [
            {
                "name": route.handler.name,
                "type": route.rule.type,
                "metadata": dict(route.rule.metadata),
                "timeout": route.rule.timeout,
                "max_sessions": route.rule.max_sessions,
                "reserved_sessions": route.rule.reserved_sessions,
            }
            for route in plugin.routes
        ],
    }


def _print_plugins(found: dict[str, list[dict[str, Any]]]) -> None:
    rows = [
        ("available", one["name"], one["value"], one["distribution"]) for one in found["available"]
    ]
    for plugin in found["active"]:
        rows.append(("active", plugin["name"], plugin["source"], ""))
        rows += [("hook", plugin["name"], hook, "") for hook in plugin["hooks"]]
        rows += [
            ("handler", one["name"], _format_handler_rule(one), _format_handler_limits(one))
            for one in plugin["handlers"]
        ]
    print_rows(("", "name", "from, or takes", "of, or limits"), rows)


def _format_handler_rule(handler: dict[str, Any]) -> str:
    pairs = {"type": handler["type"], **handler["metadata"]}
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _format_handler_limits(handler: dict[str, Any]) -> str:
    names = ("timeout", "max_sessions", "reserved_sessions")
    return " ".join(f"{name}={handler[name]}" for name in names if handler[name])
