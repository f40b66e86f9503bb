"""Options that several commands share, and the settings that they make.

Not every setting has an option: all can be given by environment and TOML file (design §5).
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from workpool.settings import Settings

_VERBOSE: Final = "workpool.verbose"


def _note_verbose(context: typer.Context, wanted: bool) -> None:
    if wanted:  # shared by a command and its parents, so -v may stand before or after the command
        context.meta[_VERBOSE] = True


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_note_verbose, help="Log everything.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file with settings.")
]
EnvironmentId = Annotated[
    str | None, typer.Option("--environment-id", metavar="ID", help="Whose queue it is.")
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
    typer.Option("--metadata", metavar="KEY=VALUE", help="Given to each item; repeatable."),
]


def is_verbose(context: typer.Context) -> bool:
    """Whether `-v` was given, before or after the command."""
    return bool(context.meta.get(_VERBOSE))


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """The settings, flags over variables over the file; None or empty: the flag was not given.

    Raises:
        SettingsError: Some are wrong.
    """
    return Settings(config=config, **{name: value for name, value in flags.items() if value})


def parse_pairs(pairs: list[str] | None) -> dict[str, str]:
    """Read `KEY=VALUE` arguments.

    Raises:
        typer.BadParameter: One is something else.
    """
    found: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def import_from_here() -> None:
    """Let a plugin be a module in the current directory, as `python -m` does."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
