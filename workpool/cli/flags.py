"""The options that several commands share, and the settings that they set.

Not every setting has an option; the environment and the TOML file can set all of them. See
workpool/docs/settings.md, "Settings".
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from workpool.settings import Settings

_VERBOSE: Final = "workpool.verbose"


def _note_verbose(context: typer.Context, wanted: bool) -> None:
    if wanted:  # shared by a command and its parents: -v may be before or after the command
        context.meta[_VERBOSE] = True


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_note_verbose, help="Log at level debug.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file with settings.")
]
EnvironmentId = Annotated[
    str | None,
    typer.Option("--environment-id", metavar="ID", help="The environment whose queue is used."),
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", metavar="URL", help="The control plane's address.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
PluginNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PLUGIN",
        help="An installed plugin, MODULE or MODULE:HANDLER. Default: the setting `plugins`.",
    ),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="Metadata of each item; repeatable."),
]


def is_verbose(context: typer.Context) -> bool:
    """Whether `-v` was given, before or after the command."""
    return bool(context.meta.get(_VERBOSE))


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """Read the settings. A flag that is None or empty was not given.

    Raises:
        SettingsError: Some settings are wrong.
    """
    return Settings(config=config, **{name: value for name, value in flags.items() if value})


def parse_pairs(pairs: list[str] | None) -> dict[str, str]:
    """Parse `KEY=VALUE` arguments.

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


def import_from_here() -> None:
    """Make modules in the current directory importable, as `python -m` does."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
