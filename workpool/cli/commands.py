"""The Typer application with all commands.

A command is imported when it runs, so that `workpool --help` and shell completion are fast. Their
texts are in the table below; a test compares them with the commands.
"""

from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from workpool.cli.help_text import PLAIN, format_examples_section
from workpool.cli.verbosity import Verbose


class CommandEntry(NamedTuple):
    """One command of the command line: its name, its module, and its summary.

    Attributes:
        name: The name that users type.
        place: Its module below `workpool.cli`, and its function or application there.
        summary: The first line of its help text.
        interspersed: Whether flags may follow arguments.
    """

    name: str
    place: str
    summary: str
    interspersed: bool = True


ENTRIES: Final = (
    CommandEntry(
        "demo",
        "demo.command:demo",
        "Show sessions of a real queue while one of two workers is killed.",
    ),
    CommandEntry("run", "run:run", "Run a pool until SIGTERM or SIGINT, which drain it."),
    CommandEntry(
        "hold",
        "hold:hold",
        "Run a program under the lease that a handler hands off.",
        interspersed=False,
    ),
    CommandEntry(
        "pause",
        "worker_commands:pause",
        "Pause a worker: it claims no more items, and its sessions go on.",
    ),
    CommandEntry("resume", "worker_commands:resume", "Let a paused worker claim items again."),
    CommandEntry(
        "drain",
        "worker_commands:drain",
        "Drain a worker: its sessions end, and then the worker ends.",
    ),
    CommandEntry(
        "top", "top:top", "Show workers and their sessions in the terminal, until Ctrl-C."
    ),
    CommandEntry("serve", "serve:serve", "Serve a work queue over HTTP until SIGTERM or SIGINT."),
    CommandEntry(
        "scale",
        "scale:scale",
        "Serve the load of a fleet to autoscalers until SIGTERM or SIGINT.",
    ),
    CommandEntry(
        "check", "check:check", "Check settings, plugins, credentials, connection and clock."
    ),
    CommandEntry(
        "conform",
        "conform:conform",
        "Check a control plane against the protocol, clause by clause.",
    ),
    CommandEntry("plugins", "plugin_list:plugins", "Show the installed and the active plugins."),
    CommandEntry("new", "new:new", "Write a plugin project: a handler with tests that pass."),
    CommandEntry("work", "work:app", "Read and change a queue."),
)
EXAMPLES: Final = format_examples_section(
    "workpool demo",
    "workpool new my-plugin",
    "workpool check reports",
    "workpool run reports --concurrency 16",
    "workpool work list",
)


class LazyCommandGroup(TyperGroup):
    """A Typer group that imports the module of a command only when the command is called."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of `ENTRIES`."""
        del ctx
        return [entry.name for entry in ENTRIES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of this name.

        While commands are listed, the result has only a name and a summary, so that the module of
        the command is not imported.
        """
        del ctx
        for entry in ENTRIES:
            if entry.name == cmd_name:
                listed = TyperCommand(entry.name, help=entry.summary, rich_markup_mode=None)
                return listed if self._listing else load_command(entry)
        return None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text without importing the commands."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the commands whose names start with `incomplete`, without importing them."""
        self._listing = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._listing = False


def load_command(entry: CommandEntry) -> Any:
    """Import the module of a command, and return the command."""
    name, _, attribute = entry.place.partition(":")
    module = import_module(f"workpool.cli.{name}")
    found = getattr(module, attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, **PLAIN)
    alone.command(
        entry.name,
        epilog=module.EXAMPLES if isinstance(module.EXAMPLES, str) else module.EXAMPLES[entry.name],
        context_settings={"allow_interspersed_args": entry.interspersed},
    )(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="workpool",
    cls=LazyCommandGroup,
    help="Run session handlers against a remote work queue.",
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    **PLAIN,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"workpool {import_module('workpool').__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root_command(
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
