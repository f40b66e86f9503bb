"""The handler of `workpool hold`, which runs a program as a session.

No process of the program's process group outlives the session, or `workpool hold` itself: without
`workpool hold`, the lease is not extended anymore.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Final

from workpool import Release, WorkpoolError, hookimpl
from workpool.wire.client_dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from workpool import Outcome, Session, WorkItem
    from workpool.events import SessionFinished

LOST_SECONDS: Final = 0.8
"""Seconds from SIGTERM to SIGKILL once the session has ended; less than the margin of a lease."""
REAP_SECONDS: Final = 2.0
CREDENTIALS: Final = frozenset(rules.credential_variable for rules in DIALECTS.values())
PREFIX: Final = "WORKPOOL_"
# A shell script that runs as the leader of the program's process group. While it runs, the system
# does not reuse the group's id. Its stdin is a pipe from `workpool hold`: when that process ends
# for any reason, the pipe closes, and the script kills the whole group.
_GUARD: Final = 'trap "" TERM INT HUP QUIT; read _; kill -KILL 0'


class ProgramFailed(WorkpoolError):
    """The program did not start, or its exit status was neither 0 nor 75 (EX_TEMPFAIL)."""


class ProgramPlugin:
    """A plugin that runs a program as its handler and stores the outcome of the session.

    Args:
        argv: The program and its arguments.
        given: More variables of the program. It also has the variables of `workpool hold`, without
            settings and credentials.

    Attributes:
        outcome: The outcome of the session; None until its end.
    """

    def __init__(self, argv: Sequence[str], given: Mapping[str, str] | None = None) -> None:
        self._given = dict(given or {})
        self.outcome: Outcome | None = None
        self._argv = argv

    @hookimpl
    def workpool_session_handler(self, item: WorkItem) -> object:
        """Return the handler, which runs an item of any type."""
        del item
        return self.run

    @hookimpl
    def workpool_event(self, event: SessionFinished) -> None:
        """Store the outcome of the session."""
        self.outcome = event.outcome

    async def run(self, session: Session) -> None:
        """Run the program until it ends; its exit status decides the outcome of the session.

        Raises:
            Release: The program exited with 75 (EX_TEMPFAIL), or a signal ended it early.
            ProgramFailed: The program failed.
        """
        with _program_in_process_group(
            self._argv, _make_program_environment(session) | self._given
        ) as (
            program,
            number,
        ):
            ended = asyncio.get_running_loop().run_in_executor(None, program.wait)
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(
                    _terminate_when_interrupted(session, number), name="program-end"
                )
                try:
                    await asyncio.wait({ended})
                except asyncio.CancelledError:
                    # A lost lease cancels the handler without an earlier interrupt. Send SIGTERM
                    # now, so that the program can end by itself before SIGKILL.
                    if not asking.done():
                        _send_signal(number, signal.SIGTERM)
                        await asyncio.wait({ended}, timeout=LOST_SECONDS)
                    raise
                finally:
                    asking.cancel()
        self._check_exit_status(session, program.returncode)

    def _check_exit_status(self, session: Session, status: int) -> None:
        if status == 0 or session.stopping:
            return
        if status == os.EX_TEMPFAIL or session.draining:
            raise Release(_status_text(status))
        raise ProgramFailed(f"{self._argv[0]}: {_status_text(status)}")


async def _terminate_when_interrupted(session: Session, group: int) -> None:
    """Send SIGTERM to the program when the session is interrupted.

    If the program ignores SIGTERM, the pool cancels the handler, which sends SIGKILL.
    """
    await session.interrupted()
    _send_signal(group, signal.SIGTERM)


@contextlib.contextmanager
def _program_in_process_group(
    argv: Sequence[str], env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the program in a process group of its own, and kill the group after the block."""
    with contextlib.ExitStack() as stack:
        guard = _start_process(("/bin/sh", "-c", _GUARD), 0, {}, stdin=subprocess.PIPE)
        stack.callback(guard.communicate)
        stack.callback(_send_signal, guard.pid, signal.SIGKILL)
        program = _start_process(argv, guard.pid, env)
        try:
            yield program, guard.pid
        finally:
            _send_signal(guard.pid, signal.SIGKILL)
            # SIGKILL does not end a process that is blocked in the kernel, so the wait is limited.
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(REAP_SECONDS)


def _start_process(
    argv: Sequence[str], group: int, env: dict[str, str], stdin: int | None = None
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(argv, env=env, stdin=stdin, process_group=group)  # noqa: S603 - the command of the caller, without a shell
    except OSError as error:
        raise ProgramFailed(f"{argv[0]}: {error.strerror}") from None


def _send_signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _make_program_environment(session: Session) -> dict[str, str]:
    """Return this process's variables without settings and credentials, plus the session's ids."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in CREDENTIALS and not name.startswith(PREFIX)
    }
    return env | {
        "WORKPOOL_WORK_ID": session.item.id,
        "WORKPOOL_SESSION_ID": session.id,
        "WORKPOOL_ENVIRONMENT_ID": session.item.environment_id,
    }


def _status_text(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
