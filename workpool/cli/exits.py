"""How a command ends: exit statuses and the one line that says why (design §6).

No message here may carry a token; the errors of workpool never do.
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
"""Something failed, or a session could not be handed back."""
USAGE: Final = 2
"""Bad usage, settings or plugins."""
REFUSED: Final = 3
"""The control plane refused: 400, 401, 403 or 404."""
SIGNALLED: Final = 128
"""Added to the number of a signal that did not let the work end."""
FLUSH_SECONDS: Final = 1.0

_REFUSALS: Final = {400, 401, 403, 404}


def status_of(error: WorkpoolError | ServeError) -> int:
    """The exit status that an error stands for."""
    if isinstance(error, ControlPlaneError):
        return REFUSED if error.status in _REFUSALS else FAILED
    if isinstance(error, StoreError):
        return FAILED
    bad_start = isinstance(error, SettingsError | PluginError | ListenError | ServeError)
    return USAGE if bad_start else FAILED


def lines_of(error: BaseException) -> tuple[str, ...]:
    """What to say of an error: a line for each problem."""
    return error.problems if isinstance(error, SettingsError) else (str(error),)


def complain(error: BaseException) -> None:
    """Say on stderr what is wrong."""
    for line in lines_of(error):
        typer.echo(f"workpool: {readable(line)}", err=True)


@contextmanager
def reported() -> Iterator[None]:
    """End the command with one line and the right status when one of our errors comes out."""
    try:
        yield
    except (WorkpoolError, ServeError) as error:
        complain(error)
        raise typer.Exit(status_of(error)) from None


def leave_now(status: int) -> NoReturn:
    """End the process without waiting for its threads. May be called on any thread.

    Flushes the logs for at most `FLUSH_SECONDS`, and nothing else: a blocked handler may hold the
    lock of a log handler, or wait until somebody reads stdout.
    """
    try:
        flushing = threading.Thread(target=_flush_logs, daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
    finally:
        os._exit(status)


def leave_in(seconds: float, status: int) -> None:
    """End the process in `seconds` unless it ends before. May be called on any thread."""
    timer = threading.Timer(seconds, leave_now, (status,))
    timer.daemon = True
    try:
        timer.start()
    except BaseException:
        leave_now(status)
        raise


def leave_despite_threads(seconds: float, status: int) -> None:
    """Let the process end by itself, but leave behind threads that still run in `seconds`.

    The interpreter waits without a bound for each thread that is no daemon. Those that it still
    waits for then are named in the log.
    """
    timer = threading.Timer(seconds, _leave_threads, (status,))
    timer.daemon = True
    timer.start()


def _leave_threads(status: int) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    for thread in left:
        log.warning("thread still runs; left behind name=%s", thread.name)
    if left:
        leave_now(status)


def _flush_logs() -> None:
    logging.shutdown()
    sys.stderr.flush()
