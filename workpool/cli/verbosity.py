"""The flag `-v`, before or after the command."""

from typing import Annotated, Final

import typer

_VERBOSE: Final = "workpool.verbose"


def _note_verbose(context: typer.Context, wanted: bool) -> None:
    if wanted:  # shared by a command and its parents: -v may be before or after the command
        context.meta[_VERBOSE] = True


Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_note_verbose, help="Log at level debug.")
]


def is_verbose(context: typer.Context) -> bool:
    """Whether `-v` was given, before or after the command."""
    return bool(context.meta.get(_VERBOSE))
