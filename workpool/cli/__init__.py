"""The `workpool` command (design §6); its modules need the extra `cli`.

Owns what a library must not: logging configuration, signal handlers, the loop's kind and the exit
status. Results go to stdout, logs and complaints to stderr.
"""

import importlib
import sys

_EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command line; without its extra, print the line that installs it and exit with 2."""
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
