"""Exit statuses, the error lines on stderr, and functions that end the process.

No message may contain a token; the errors of workpool never do. See workpool/docs/cli.md,
"Exit statuses".
"""

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NoReturn

import typer

from workpool.errors import (
    ControlPlaneError,
    ListenError,
    PluginError,
    RefusedError,
    SettingsError,
    WorkpoolError,
)
from workpool.logs import readable
from workpool.server import ServeError, StoreError
from workpool.settings import Settings

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
FAILED_SECONDS: Final = 3.0
"""Seconds in which a pool whose leases are not renewed anymore may drain by itself."""
FLUSH_SECONDS: Final = 1.0

_is_import_frame: Final = re.compile(
    r"<frozen importlib.*|.*importlib.__init__\.py|.*inspect\.py|.*workpool.plugins.\w+\.py"
).fullmatch
"""Matches the files whose frames only import a plugin, which its author need not see."""
_REFUSALS: Final = {400, 401, 403, 404}
ADVICE: Final[Mapping[int, str]] = {
    400: "the environment must be self_hosted, and base_url must hold the dialect's prefix",
    401: "the token is wrong or has expired: make a new one",
    403: "the token may not use this environment",
    404: "check environment_id and base_url",
}
"""The advice after a refusal by the control plane, by status."""
_REFUSED_SETTINGS: Final[Mapping[int, tuple[str, ...]]] = {
    400: ("environment_id", "base_url"),
    401: ("token", "token_file"),
    403: ("token", "token_file", "environment_id"),
    404: ("environment_id", "base_url"),
}
"""The settings that a refusal is probably about."""


def append_advice_to_error_line(line: str, error: Exception, settings: Settings) -> str:
    """Return `line` with advice and with the sources of the settings that may be wrong."""
    names: tuple[str, ...] = ("metrics_listen",) if isinstance(error, ListenError) else ()
    if isinstance(error, RefusedError) and (advice := ADVICE.get(error.status or 0)):
        line = f"{line}; {advice}"
        names = _REFUSED_SETTINGS[error.status or 0]
    origins = {name: settings.origin_of(name) for name in names}
    found = ", ".join(f"{name} from {origin}" for name, origin in origins.items() if origin)
    return f"{line} ({found})" if found else line


def find_exit_status(error: WorkpoolError | ServeError) -> int:
    """Return the exit status for a command that ends with this error."""
    if isinstance(error, ControlPlaneError):
        return REFUSED if error.status in _REFUSALS else FAILED
    if isinstance(error, StoreError):
        return FAILED
    bad_start = isinstance(error, SettingsError | PluginError | ListenError | ServeError)
    return USAGE if bad_start else FAILED


def format_error_lines(error: BaseException) -> tuple[str, ...]:
    """Return the lines that describe an error, one for each problem."""
    return error.problems if isinstance(error, SettingsError) else (str(error),)


def print_error(error: BaseException) -> None:
    """Print the lines of an error to stderr, and the traceback if a plugin raised the error."""
    for line in format_error_lines(error):
        typer.echo(f"workpool: {readable(line)}", err=True)
    print_plugin_traceback(error)


def print_plugin_traceback(error: BaseException) -> None:
    """Print the traceback of the exception that a plugin raised, if any, to stderr."""
    trace = find_plugin_exception_info(error)
    if trace is not None:
        for line in "".join(traceback.format_exception(*trace)).splitlines():
            typer.echo(f"  {readable(line)}", err=True)


def find_plugin_exception_info(
    error: BaseException,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    """Return the exception that a plugin raised, as `exc_info`; None if no plugin raised one."""
    cause = error.__cause__ if isinstance(error, PluginError) else None
    frames = None if cause is None else cause.__traceback__
    while frames is not None and _is_import_frame(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    if cause is None or (frames is None and not isinstance(cause, SyntaxError)):
        return None
    return type(cause), cause, frames


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of workpool that the block raises, and exit with the status of the error."""
    try:
        yield
    except (WorkpoolError, ServeError) as error:
        print_error(error)
        raise typer.Exit(find_exit_status(error)) from None


def end_process_now(status: int) -> NoReturn:
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


def schedule_process_end(seconds: float, status: int) -> None:
    """Start a timer that ends the process after `seconds`, and return at once.

    May be called on any thread.
    """
    timer = threading.Timer(seconds, end_process_now, (status,))
    timer.daemon = True
    try:
        timer.start()
    except BaseException:
        end_process_now(status)
        raise


def end_process_if_threads_remain(seconds: float, status: int) -> None:
    """Start a timer that ends the process after `seconds` if non-daemon threads still run.

    Without the timer, the interpreter would wait for these threads without a bound. A warning is
    logged for each of them.
    """
    timer = threading.Timer(seconds, _end_process_if_threads_run, (status,))
    timer.daemon = True
    timer.start()


def _end_process_if_threads_run(status: int) -> None:
    main = threading.main_thread()
    left = [each for each in threading.enumerate() if not each.daemon and each is not main]
    for thread in left:
        log.warning("thread still runs; abandoned", extra={"thread_name": thread.name})
    if left:
        end_process_now(status)


def _flush_logs() -> None:
    logging.shutdown()
    sys.stderr.flush()
