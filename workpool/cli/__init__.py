"""The `workpool` command (design §6); its modules need the extra `cli`.

Owns what a library must not: logging configuration, signal handlers, the loop's kind and the exit
status. Results go to stdout, logs and complaints to stderr.
"""

import sys

_EXTRA = {"typer", "rich", "click"}


def main() -> None:
    """Run the command line; without its extra, print the line that installs it and exit with 2."""
    try:
        from workpool.cli.app import app  # noqa: PLC0415 - the extra may be missing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write("workpool: the command line needs: pip install 'workpool[cli]'\n")
        sys.exit(2)
    app(prog_name="workpool")
