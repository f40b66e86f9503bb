"""The command `workpool`. Its modules need the extra `cli`.

Only the command changes global state of the process: the configuration of logging, the signal
handlers, the kind of event loop, and the exit status. Results go to stdout, logs and errors to
stderr. See workpool/docs/cli.md, "Command line".
"""

import importlib
import sys

from workpool.cli.signal_recorder import SignalRecorder

_EXTRA = ("typer", "rich")
_DRAINING = {"demo", "hold", "run", "serve"}
"""The commands that drain on SIGTERM and SIGINT. A signal ends any other command at once."""


def main() -> None:
    """Run the command line; without the extra `cli`, print how to install it and exit with 2."""
    if _find_command_name(sys.argv[1:]) in _DRAINING:
        SignalRecorder().install_handlers()
    try:
        for name in _EXTRA:
            importlib.import_module(name)
    except ModuleNotFoundError:
        sys.stderr.write(
            "workpool: the command line needs its extra: pip install 'workpool[cli]'\n"
        )
        sys.exit(2)
    from workpool.cli.commands import app  # noqa: PLC0415 - the extra may be missing

    app(prog_name="workpool")


def _find_command_name(arguments: list[str]) -> str | None:
    """Return the command, which is the first argument that is not an option."""
    return next((each for each in arguments if not each.startswith("-")), None)
