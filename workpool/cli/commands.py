"""The Typer application with all commands.

A command is imported when it runs, so that `workpool --help` and shell completion are fast. Their
texts are in the table below; a test compares them with the commands.
"""

from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from workpool.cli.help_text import PLAIN, examples
from workpool.cli.verbosity import Verbose


class Entry(NamedTuple):
    """A command: its name, its place below `workpool.cli`, and the first line of its help.

    `interspersed`: whether flags may follow arguments.
    """

    name: str
    place: str
    summary: str
    interspersed: bool = True


ENTRIES: Final = (
    Entry(
        "demo",
        "demo.command:demo",
        "Show sessions of a real queue while one of two workers is killed.",
    ),
    Entry("run", "run:run", "Run a pool until SIGTERM or SIGINT, which drain it."),
    Entry(
        "hold",
        "hold:hold",
        "Run a program under the lease that a handler hands off.",
        interspersed=False,
    ),
    Entry("pause", "control:pause", "Let a worker claim no more items; its sessions go on."),
    Entry("resume", "control:resume", "Let a paused worker claim items again."),
    Entry("drain", "control:drain", "Let a worker end its sessions, and then itself."),
    Entry("top", "top:top", "Show workers and their sessions in the terminal, until Ctrl-C."),
    Entry("serve", "serve:serve", "Serve a work queue over HTTP until SIGTERM or SIGINT."),
    Entry("scale", "scale:scale", "Serve numbers for autoscalers until SIGTERM or SIGINT."),
    Entry("check", "check:check", "Check settings, plugins, credentials, connection and clock."),
    Entry(
        "conform",
        "conform:conform",
        "Check a control plane against the protocol, clause by clause.",
    ),
    Entry("plugins", "plugin_list:plugins", "Show the installed and the active plugins."),
    Entry("new", "new:new", "Write a plugin project: a handler with tests that pass."),
    Entry("work", "work:app", "Read and change a queue."),
)
EXAMPLES: Final = examples(
    "workpool demo",
    "workpool new my-plugin",
    "workpool check reports",
    "workpool run reports --concurrency 16",
    "workpool work list",
)


class Commands(TyperGroup):
    """The commands of the table. A command is imported when it is called, not to list it."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        del ctx
        return [entry.name for entry in ENTRIES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; while commands are listed, return one that has only its summary."""
        del ctx
        for entry in ENTRIES:
            if entry.name == cmd_name:
                listed = TyperCommand(entry.name, help=entry.summary, rich_markup_mode=None)
                return listed if self._listing else load(entry)
        return None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help text without importing the commands."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Return the commands that start with this text, without importing them."""
        self._listing = True
        try:
            return super().shell_complete(ctx, incomplete)
        finally:
            self._listing = False


def load(entry: Entry) -> Any:
    """Import a command."""
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
    cls=Commands,
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
