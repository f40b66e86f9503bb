"""The `workpool` command (design §6); its modules need the extra `cli`.

Owns what a library must not: logging configuration, signal handlers, the loop's kind and the exit
status. Results go to stdout, logs and complaints to stderr.
"""

import importlib
import sys

from workpool.cli.signal_recorder import SignalRecorder

_EXTRA = ("typer", "rich")
_DRAINING = {"demo", "hold", "run", "serve"}
"""The commands that SIGTERM and SIGINT end in order; a signal ends any other at once."""


def main() -> None:
    """Run the command line; without its extra, print the line that installs it and exit with 2."""
    if _command_of(sys.argv[1:]) in _DRAINING:
        SignalRecorder().install()
    try:
        for name in _EXTRA:
            importlib.import_module(name)
    except ModuleNotFoundError:
        sys.stderr.write(
            "workpool: the command line needs its extra: pip install 'workpool[cli]'\n"
        )
        sys.exit(2)
    from workpool.cli.app import app  # noqa: PLC0415 - the extra may be missing

    app(prog_name="workpool")


def _command_of(arguments: list[str]) -> str | None:
    """The name of the command: none of the options before it takes a value."""
    return next((each for each in arguments if not each.startswith("-")), None)
