"""The TOML file of a worker: its tables, and the settings and plugin options in them.

No error shows a value of the file: it may be a secret in the wrong place.
See workpool/docs/settings.md, "Settings".
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workpool.errors import SettingsError
from workpool.setting_values import SourcedValue, append_setting_sources, parse_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Table = dict[str, Any]


class ConfigFile(NamedTuple):
    """The content of the TOML file: the table `[workpool]` and its sub-tables.

    Attributes:
        path: The path of the file; None without a file.
        table: The table `[workpool]` without its sub-tables.
        plugins: The tables `[workpool.plugin.NAME]`, by name.
        environments: The tables `[workpool.environments.ID]`, by id.
    """

    path: Path | None
    table: Table
    plugins: Mapping[str, Table]
    environments: Mapping[str, Table]

    def settings_of_workpool_table(self) -> dict[str, SourcedValue]:
        """Return the settings of the table `[workpool]`."""
        return {name: SourcedValue(value, str(self.path)) for name, value in self.table.items()}

    def settings_of_environment_table(self, environment_id: str) -> dict[str, SourcedValue]:
        """Return the settings of the table `[workpool.environments.ID]` for this id."""
        table = {**self.environments[environment_id], "environment_id": environment_id}
        origin = self.environment_table_name(environment_id)
        return {
            name: SourcedValue(value, origin) for name, value in table.items() if name != "plugin"
        }

    def environment_table_name(self, environment_id: str) -> str:
        """Return the text that names an environment's TOML table in error messages."""
        return f"{self.path} [workpool.environments.{environment_id}]"

    def plugin_tables(self, plugins: Iterable[str]) -> Mapping[str, Table]:
        """Return the tables `[workpool.plugin.NAME]` for one environment, which runs `plugins`.

        A table is left out if only other environments run its plugin: this environment would refuse
        it as a table of no active plugin.
        """
        given = [table.get("plugins") for table in (self.table, *self.environments.values())]
        elsewhere = {name for each in given for name in _find_plugin_table_names(each)}
        here = _find_plugin_table_names(tuple(plugins))
        return {
            name: table
            for name, table in self.plugins.items()
            if name in here or name not in elsewhere or not self.environments
        }


def read_config_file(file: str | os.PathLike[str] | None, origin: str) -> ConfigFile:
    """Read the TOML file.

    Args:
        file: The path of the file; None or empty: there is none.
        origin: The source of the path.

    Raises:
        SettingsError: The file cannot be read, or a table has a wrong form.
    """
    if not file:
        return ConfigFile(None, {}, {}, {})
    try:
        with Path(file).open("rb") as opened:
            table = tomllib.load(opened).get("workpool")
        problem = "has no table [workpool]"
    except OSError as error:
        table, problem = None, error.strerror or "cannot be read"
    # The file is not TOML or not UTF-8. Do not quote the error, which may contain a secret value.
    except ValueError as error:
        place = re.search(r"\(at line \d+, column \d+\)$", str(error))
        twice = "a table or key is given twice" if " twice " in str(error) else "not TOML"
        table, problem = None, f"{twice} {place[0]}" if place else "not TOML"
    if isinstance(table, dict):
        problem = _find_config_table_problem(table)
        if not problem:
            below = table.pop("plugin", {}), table.pop("environments", {})
            return ConfigFile(Path(file), table, *below)
    found = append_setting_sources(f"config: {os.fspath(file)}: {problem}", {"config": origin})
    raise SettingsError((found,))


def _find_config_table_problem(table: Table) -> str:
    """Return a text about wrong sub-tables of `[workpool]`; empty if all are correct."""
    for name in ("plugin", "environments"):
        below = table.get(name, {})
        if not isinstance(below, dict) or not all(isinstance(t, dict) for t in below.values()):
            return f"[workpool.{name}] holds something else than tables"
    if table.get("environments") == {}:
        return "[workpool.environments] has no table of an environment"
    if isinstance(table.get("plugins"), dict):
        # `[workpool.plugins.NAME]` is a misspelling of `[workpool.plugin.NAME]`. Refuse it even if
        # a flag or a variable sets `plugins`: the plugins would run without their options.
        return "the tables of plugins are [workpool.plugin.NAME], without an s"
    if isinstance(table.get("environment"), dict | list):
        return "the tables of environments are [workpool.environments.ID], with an s"
    return ""


def find_environment_id_problems(file: ConfigFile, given: SourcedValue) -> list[str]:
    """Return the problems of `environment_id` if the TOML file has tables of environments.

    `given` is the value from a variable or a keyword, which names no environment of the file.
    """
    if not file.environments:
        return []
    problems = []
    if "environment_id" in file.table:
        problems.append(
            "environment_id: the tables [workpool.environments.ID] name the environments; remove "
            f"it (from {file.path})"
        )
    if given.value:
        known = ", ".join(file.environments)
        problem = f"environment_id: {file.path} has tables of {known}, and none of this one"
        problems.append(append_setting_sources(problem, {"environment_id": given.origin}))
    return problems


def find_environment_table_problems(
    file: ConfigFile, environment_id: str, process_settings: Iterable[str]
) -> list[str]:
    """Return a problem for each setting in an environment's table that is not allowed there.

    `process_settings` are the settings that only the table `[workpool]` may hold.
    """
    refused = {
        "environment_id": "the name of the table is the id; remove it",
        "plugin": "the tables of plugins are [workpool.plugin.NAME], for all environments",
        **dict.fromkeys(process_settings, "is for all environments; move it to [workpool]"),
    }
    table, origin = file.environments[environment_id], file.environment_table_name(environment_id)
    problems = [f"{name}: {refused[name]} (from {origin})" for name in table if name in refused]
    return problems + find_environment_id_problems(file, SourcedValue(None, ""))


def _find_plugin_table_names(plugins: object) -> set[str]:
    """Return the names that the tables `[workpool.plugin.NAME]` of these plugins may have.

    Empty if `plugins` is not a list of names.
    """
    try:
        given = parse_names(plugins)
    except ValueError:
        return set()
    # The table of an installed plugin is named after the plugin's entry point. The table of
    # `pkg.module` or `pkg.module:Name` is named after the last part, `module` or `Name`.
    return {*given, *(re.split("[.:]", each)[-1] for each in given)}
