"""The Typer application with all commands."""

from typing import Annotated

import typer

from workpool import __version__
from workpool.cli import check, conform, hold, listing, new, run, serve, work
from workpool.cli.demo import command as demo_command
from workpool.cli.flags import Verbose

# Rich tracebacks show local variables, which may be tokens.
app = typer.Typer(
    name="workpool",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run session handlers against a remote work queue.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"workpool {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and end."
        ),
    ] = False,
    _verbose: Verbose = False,
) -> None:
    """Run session handlers against a remote work queue."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(demo_command.demo)
app.command()(run.run)
app.command(context_settings={"allow_interspersed_args": False})(hold.hold)
app.command()(serve.serve)
app.command()(check.check)
app.command()(conform.conform)
app.command("plugins")(listing.plugins)
app.command()(new.new)
app.add_typer(work.app, name="work")
