"""The result of a command: an outcome from its exit status, and metadata from its last output line.

The exit statuses are those of `sysexits.h`: 0 is success, 75 (EX_TEMPFAIL) requests another try,
and any other status is a failure.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from workpool import Release, WorkpoolError
from workpool.errors import exhausted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool import Session

MAX_RESULT_BYTES: Final = 65_536
"""The largest length of the line with the result, in bytes."""


class CommandFailed(WorkpoolError):
    """The command failed, could not be started, or printed an unusable result.

    Attributes:
        program: The name of the program. Arguments may be secrets and are not stored.
        status: The exit status, or the negative number of the signal that ended the command. None
            if the status is not the reason.
    """

    def __init__(self, program: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"{program}: {problem}")
        self.program = program
        self.status = status


@contextmanager
def release_or_fail_on_start_error(program: str) -> Iterator[None]:
    """Convert an `OSError` at the start of a command to `Release` or `CommandFailed`.

    Raises:
        Release: The machine has no free memory, processes or descriptors.
        CommandFailed: Any other error of the operating system.
    """
    try:
        yield
    except OSError as error:
        if exhausted(error):
            raise Release(f"{program}: {error.strerror}") from error
        raise CommandFailed(program, f"cannot be started: {error}") from error


def raise_for_exit_status(session: Session, program: str, status: int | None) -> None:
    """Raise an error for a failed command, unless a stop request has ended the command.

    Args:
        session: The session of the command.
        program: The command's name.
        status: The exit status, or the negative number of the signal that ended the command; None
            if other code in this process has reaped it.

    Raises:
        Release: The command requests another try, or a drain ended the command early.
        CommandFailed: The command failed.
    """
    if status is None:
        raise CommandFailed(program, "its exit status was taken by something else in this process")
    if status == 0:
        return
    if status == os.EX_TEMPFAIL:
        raise Release(f"{program}: {describe_exit_status(status)}")
    if session.stopping:
        session.log.info(
            "command ended: %s",
            describe_exit_status(status),
            extra={"program": program, "status": status},
        )
    elif session.draining:
        raise Release("the pool is draining")
    else:
        raise CommandFailed(program, describe_exit_status(status), status)


def describe_exit_status(status: int | None) -> str:
    """Return a text such as `exit status 3` or `killed by SIGSEGV`."""
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def parse_result(program: str, line: bytes) -> dict[str, str]:
    """Parse the last output line of a command as metadata.

    Args:
        program: The command's name, for the error.
        line: The line, or its first `MAX_RESULT_BYTES` + 1 bytes.

    Raises:
        CommandFailed: The line is not a JSON object of strings. The text does not quote it.
    """
    if len(line) > MAX_RESULT_BYTES:
        raise CommandFailed(program, f"its last line is longer than {MAX_RESULT_BYTES} bytes")
    try:
        metadata = json.loads(line)
        if isinstance(metadata, dict) and all(isinstance(each, str) for each in metadata.values()):
            # Refuse lone surrogates, which no request could send: `encode` raises a ValueError.
            "".join((*metadata.keys(), *metadata.values())).encode()
            return metadata
    except (ValueError, RecursionError):
        pass
    raise CommandFailed(program, "its last line on stdout is not a JSON object of strings")
