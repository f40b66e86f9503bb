"""`workpool demo`, as it is asked for; `show` is the performance."""

from typing import Annotated

import typer

from workpool.cli import exits
from workpool.cli.options import Metadata, parse_pairs


def demo(
    handler: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:HANDLER", help="Your own handler. Default: the example."),
    ] = None,
    metadata: Metadata = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many sessions.")] = 40,
) -> None:
    """Watch sessions flow through a real queue, while one of two workers is killed."""
    from workpool.cli.show import perform  # noqa: PLC0415 - its imports would delay every worker

    with exits.reported():
        raise typer.Exit(perform(handler, parse_pairs(metadata), count))
