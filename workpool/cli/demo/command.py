"""The arguments and the help text of `workpool demo`."""

from typing import Annotated, Final

import typer

from workpool.cli import exits
from workpool.cli.flags import Metadata, parse_key_value_pairs
from workpool.cli.help_text import format_examples_section

EXAMPLES: Final = format_examples_section(
    "workpool demo",
    "workpool demo reports:daily_report --count 10",
    "workpool demo reports --metadata job=daily-report --metadata day=monday",
)


def demo(
    handler: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:HANDLER", help="The handler. Default: an example."),
    ] = None,
    metadata: Metadata = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="The number of sessions.")] = 40,
) -> None:
    """Show sessions of a real queue while one of two workers is killed.

    Without --metadata, the items match the rule of the handler. Exit status: 1 if a session failed,
    was lost, or ran twice at once.
    """
    from workpool.cli.demo.demo_runner import run_demo  # noqa: PLC0415 - its imports would slow down each start of a worker

    with exits.exit_on_error():
        raise typer.Exit(run_demo(handler, parse_key_value_pairs(metadata), count))
