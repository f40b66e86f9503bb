"""What a command's end means: its exit status, and its last line as metadata.

The contract is the one of `sysexits.h`: 0 is done, 75 (EX_TEMPFAIL) is "give it to somebody again",
anything else is a failure.
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

RESULT_LIMIT: Final = 65_536
"""Bytes of the line that holds the result."""


class CommandFailed(WorkpoolError):
    """The command failed, could not be started, or its result cannot be used.

    Attributes:
        program: Its name, without arguments, which may hold secrets.
        status: Its exit status, the negative number of the signal that ended it, or None when the
            status is not what failed.
    """

    def __init__(self, program: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"{program}: {problem}")
        self.program = program
        self.status = status


@contextmanager
def blamed(program: str) -> Iterator[None]:
    """Make what keeps a command from being started the session's error.

    Raises:
        Release: The machine has run out of something.
        CommandFailed: Any other error of the operating system.
    """
    try:
        yield
    except OSError as error:
        if exhausted(error):
            raise Release(f"{program}: {error.strerror}") from error
        raise CommandFailed(program, f"cannot be started: {error}") from error


def settle(session: Session, program: str, status: int | None) -> None:
    """Return if the command has done its work, or need not have.

    Args:
        session: Whose end it is.
        program: The command's name.
        status: Its exit status, or the negative number of the signal that ended it; None when
            somebody else in this process has taken it.

    Raises:
        Release: It asks for another try, or the pool's drain has cut it short.
        CommandFailed: It failed.
    """
    if status is None:
        raise CommandFailed(program, "its exit status was taken by something else in this process")
    if status == 0:
        return
    if status == os.EX_TEMPFAIL:
        raise Release(f"{program}: {text_of(status)}")
    if session.stopping:  # we have ended it, as an operator asked for
        session.log.info("command ended program=%s %s", program, text_of(status))
    elif session.draining:
        raise Release("the pool is draining")
    else:
        raise CommandFailed(program, text_of(status), status)


def text_of(status: int | None) -> str:
    """`exit status 3`, or `killed by SIGSEGV`."""
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def result_of(program: str, line: bytes) -> dict[str, str]:
    """Read a command's last line as metadata.

    Args:
        program: The command's name, for the error.
        line: The line, or its first `RESULT_LIMIT` + 1 bytes.

    Raises:
        CommandFailed: It is not a JSON object of strings; what it is instead is not quoted.
    """
    if len(line) > RESULT_LIMIT:
        raise CommandFailed(program, f"its last line is longer than {RESULT_LIMIT} bytes")
    try:
        found = json.loads(line)
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            "".join((*found.keys(), *found.values())).encode()  # a lone surrogate cannot be sent
            return found
    except (ValueError, RecursionError):
        pass
    raise CommandFailed(program, "its last line on stdout is not a JSON object of strings")
