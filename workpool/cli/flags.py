"""The flags that several commands share, and the settings that are read from flags.

`run` and `check` have a flag for each setting but the credentials, which would be visible in the
list of processes. See workpool/docs/settings.md, "Settings".
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import typer

from workpool.errors import SettingsError
from workpool.settings import DESCRIPTIONS, PREFIX, Settings
from workpool.wire.client_dialects import DIALECTS

WITHOUT_FLAG: Final = frozenset({"token", "api_key", "extra_headers", "plugins"})
"""The settings that hold credentials, and the one that has arguments."""
METAVARS: Final[Mapping[str, str]] = {
    "base_url": "URL",
    "dialect": "|".join(DIALECTS),
    "environment_id": "ID",
    "worker_id": "ID",
    "rate_limit_group": "NAME",
    "drain_timeout": "SECONDS|unlimited",
    "report_errors": "type|message",
    "metrics_listen": "HOST:PORT|off",
    "live_page_ids": "loopback|always",
    "log_level": "LEVEL",
    "control_socket": "PATH|off",
    "log_format": "text|json",
    **dict.fromkeys(
        ("token_file", "api_key_file", "ca_file", "client_cert_file", "client_key_file"), "FILE"
    ),
    **dict.fromkeys(("pollers", "concurrency", "prefetch", "max_attempts"), "NUMBER"),
    "exit_after_sessions": "NUMBER",
    **dict.fromkeys(("read_rate", "write_rate"), "NUMBER"),
    **dict.fromkeys(("block_ms", "reclaim_older_than_ms"), "MILLISECONDS"),
}
"""The values of flags in help texts; all others are SECONDS."""


def flag_name(setting: str) -> str:
    """Return the flag of a setting."""
    return f"--{setting.replace('_', '-')}"


def _make_setting_option(setting: str) -> Any:
    """Return the Typer option of a setting; its help names the environment variable."""
    return typer.Option(
        flag_name(setting),
        metavar=METAVARS.get(setting, "SECONDS"),
        help=f"{DESCRIPTIONS[setting]} Variable: `{PREFIX}{setting.upper()}`.",
    )


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A TOML file with settings. Default: none. Variable: `WORKPOOL_CONFIG`.",
    ),
]
EnvironmentId = Annotated[str | None, _make_setting_option("environment_id")]
BaseUrl = Annotated[str | None, _make_setting_option("base_url")]
Dialect = Annotated[str | None, _make_setting_option("dialect")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
PluginNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PLUGIN",
        help="An installed plugin, MODULE or MODULE:HANDLER. Default: the setting `plugins`. "
        "Variable: `WORKPOOL_PLUGINS`.",
    ),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="KEY=VALUE",
        help="Metadata of each item; repeatable. Default: none.",
    ),
]


class FlagSettings(Settings):
    """Settings whose values come from flags: an error about a value names its flag."""

    names: ClassVar[Mapping[str, str]] = {"plugins": "PLUGIN"}
    """The source of a command's setting that has no flag."""

    @classmethod
    def _keyword_source_name(cls, name: str) -> str:
        return cls.names.get(name) or flag_name(name)


def read_command_settings(
    config: Path | None, *, of: type[Settings] = FlagSettings, **flags: Any
) -> Settings:
    """Read the settings from flags, environment variables and the TOML file.

    A flag whose value is None or an empty list counts as not given.

    Raises:
        SettingsError: Some settings are wrong.
    """
    return of(config=config, **_find_given_flags(flags))


def read_environments(config: Path | None, **flags: Any) -> tuple[Settings, tuple[Settings, ...]]:
    """Read the settings of the process, and the settings of each environment in the TOML file.

    Raises:
        SettingsError: Some settings are wrong.
    """
    return FlagSettings.of_environments(config=config, **_find_given_flags(flags))


def require_connection_settings(settings: Settings, environments: Sequence[Settings]) -> None:
    """Check that each environment has the settings that its connection needs.

    Raises:
        SettingsError: Some settings are missing; the error names all of them.
    """
    problems: list[str] = []
    for each in environments or (settings,):
        try:
            each.require_connection()
        except SettingsError as error:
            found = f"{each.environment_id}: " if environments else ""
            problems += [f"{found}{problem}" for problem in error.problems]
    if problems:
        raise SettingsError(tuple(problems))


def _find_given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None and value != []}


def add_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: add a flag for each setting.

    The command receives the values of these flags as its argument `flags`, a mapping.
    """
    names = [name for name in DESCRIPTIONS if name not in WITHOUT_FLAG]
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, _make_setting_option(name)],
        )
        for name in names
    ]
    own = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(command).parameters.values()
        if each.name != "flags"
    ]

    def run_command_with_flags(**given: Any) -> None:
        command(flags={name: given.pop(name) for name in names}, **given)

    run_command_with_flags.__doc__ = command.__doc__
    run_command_with_flags.__annotations__ = {each.name: each.annotation for each in (*own, *flags)}
    vars(run_command_with_flags)["__signature__"] = inspect.Signature([*own, *flags])
    return run_command_with_flags


def parse_key_value_pairs(pairs: list[str] | None) -> dict[str, str]:
    """Parse arguments of the form `KEY=VALUE` into a mapping.

    Raises:
        typer.BadParameter: An argument has another form.
    """
    found: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def add_current_directory_to_path() -> None:
    """Add the current directory to `sys.path`, as `python -m` does."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
