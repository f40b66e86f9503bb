"""The flag `-v`, which users may write before or after the command."""

from typing import Annotated, Final

import typer

_VERBOSE: Final = "workpool.verbose"


def _store_verbose_flag(context: typer.Context, wanted: bool) -> None:
    # A command and its parents share `context.meta`, so the place of `-v` does not matter.
    if wanted:
        context.meta[_VERBOSE] = True


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_store_verbose_flag, help="Log at level debug.")
]


def is_verbose(context: typer.Context) -> bool:
    """Return whether `-v` was given, before or after the command."""
    return bool(context.meta.get(_VERBOSE))
