"""Exit statuses, and the line on stderr that gives the reason.

No message may contain a token; the errors of workpool never do. See workpool/docs/cli.md,
"Exit statuses".
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import typer

from workpool.errors import (
    ControlPlaneError,
    ListenError,
    PluginError,
    SettingsError,
    WorkpoolError,
)
from workpool.logs import readable
from workpool.server import ServeError, StoreError

log = logging.getLogger("workpool")

OK: Final = 0
FAILED: Final = 1
"""A failure, or a session that could not be released."""
USAGE: Final = 2
"""Wrong usage, settings or plugins."""
REFUSED: Final = 3
"""Refused by the control plane: 400, 401, 403 or 404."""
SIGNALLED: Final = 128
"""Added to the number of a signal that ended the work early."""
FLUSH_SECONDS: Final = 1.0

_REFUSALS: Final = {400, 401, 403, 404}


def status_of(error: WorkpoolError | ServeError) -> int:
    """Return the exit status of an error."""
    if isinstance(error, ControlPlaneError):
        return REFUSED if error.status in _REFUSALS else FAILED
    if isinstance(error, StoreError):
        return FAILED
    bad_start = isinstance(error, SettingsError | PluginError | ListenError | ServeError)
    return USAGE if bad_start else FAILED


def lines_of(error: BaseException) -> tuple[str, ...]:
    """Return the lines that describe an error, one for each problem."""
    return error.problems if isinstance(error, SettingsError) else (str(error),)


def print_error(error: BaseException) -> None:
    """Print an error to stderr."""
    for line in lines_of(error):
        typer.echo(f"workpool: {readable(line)}", err=True)


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error of workpool into a line on stderr and its exit status."""
    try:
        yield
    except (WorkpoolError, ServeError) as error:
        print_error(error)
        raise typer.Exit(status_of(error)) from None


def leave_now(status: int) -> NoReturn:
    """End the process without waiting for its threads. May be called on any thread.

    Only flushes the logs, for at most `FLUSH_SECONDS`: a blocked handler may hold the lock of a log
    handler, or wait for the reader of stdout.
    """
    try:
        flushing = threading.Thread(target=_flush_logs, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
    finally:
        os._exit(status)


def leave_in(seconds: float, status: int) -> None:
    """End the process after `seconds`, unless it ends before. May be called on any thread."""
    timer = threading.Timer(seconds, leave_now, (status,))
    timer.daemon = True
    try:
        timer.start()
    except BaseException:
        leave_now(status)
        raise


def leave_despite_threads(seconds: float, status: int) -> None:
    """Let the process end by itself, but abandon threads that still run after `seconds`.

    The interpreter waits without a bound for each thread that is not a daemon. The log names the
    abandoned threads.
    """
    timer = threading.Timer(seconds, _leave_threads, (status,))
    timer.daemon = True
    timer.start()


def _leave_threads(status: int) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    for thread in left:
        log.warning("thread still runs; abandoned", extra={"thread_name": thread.name})
    if left:
        leave_now(status)


def _flush_logs() -> None:
    logging.shutdown()
    sys.stderr.flush()
