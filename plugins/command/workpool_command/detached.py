"""A command that outlives the worker: under `workpool hold`, which extends its lease.

A handoff that fails needs no clean-up. `hold` starts the command only once its first heartbeat has
succeeded, and that heartbeat is refused as soon as the pool holds the item again.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakSet

from workpool import Release
from workpool.errors import HandoverError, innermost
from workpool_command.ending import CommandFailed, exit_status_text, start_errors_as_session_errors
from workpool_command.group import CommandStart, ProcessGroup, start_group
from workpool_command.surroundings import (
    inherited_variables,
    item_json,
    may_have_run_before,
    trace_variables,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool import Session, Settings

OUTPUT: Final = "output.log"
"""The file in the session's directory for the output of `hold` and the command."""
ENDED: Final = {0, 1}
"""Exit statuses of a `hold` that may have taken the item over, successful or not."""
UNUSABLE: Final = 2
"""Exit status of a `hold` with wrong settings."""


class DetachableCommand(Protocol):
    """The settings that a detached command needs; `plugin.Command` documents them."""

    command: Sequence[str]
    environment: Sequence[str]
    grace: float
    item_token: bool
    timeout: float | None


class HoldProcesses:
    """Starts a `workpool hold` process per session, and reaps those that end before the worker."""

    def __init__(self, command: DetachableCommand, settings: Settings) -> None:
        self._command = command
        self._settings = settings
        # A process is removed from this list once it has ended.
        self._groups: WeakSet[ProcessGroup] = WeakSet()

    def close(self) -> None:
        """Leave the processes running; the init process reaps them after the worker's end."""
        for group in list(self._groups):
            group.close()

    async def hand_off(self, session: Session, cwd: Path) -> None:
        """Start the command under `workpool hold`, and wait until that has taken the item over.

        Raises:
            CommandFailed: `hold` cannot start with these settings.
            Release: `hold` cannot run now, or was not ready in time.
            SessionGoneError: The item was not handed off: see `Session.handover`.
        """
        if self._command.item_token and session.item.sessions_token is None:
            problem = "the item came without a token of its own, and item_token is set"
            raise CommandFailed("workpool hold", problem)
        group: ProcessGroup | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async with session.handover() as lease:
                    keyless = self._command.item_token
                    given = lease.keyless_variables if keyless else lease.variables
                    group = self._start_hold(session, cwd, given)
                    watching = tasks.create_task(self._detect_early_end(group, cwd), name="hold")
                watching.cancel()
        except BaseExceptionGroup as failure:
            error = innermost(failure)
            if group is None or not isinstance(error, HandoverError):
                # Raises the error in the group instead of the group.
                raise error from error.__cause__
            group.signal(
                signal.SIGKILL
            )  # Its heartbeat would be refused, because the pool holds the item again.
            raise Release("workpool hold was not ready in time") from error
        finally:
            if group is not None:
                self._groups.add(group)
                group.leave_running()

    def _start_hold(self, session: Session, cwd: Path, lease: Mapping[str, str]) -> ProcessGroup:
        hold = (
            sys.executable,
            "-P",
            "-m",
            "workpool",
            "hold",
            "--",
        )  # -P: no modules of the directory `cwd`
        more = may_have_run_before(session) | trace_variables(session)
        ids = [f"{name}={value}" for name, value in more.items()]
        with start_errors_as_session_errors("workpool hold"), (cwd / OUTPUT).open("ab") as output:
            return start_group(
                CommandStart(
                    argv=(*hold, "env", *ids, *self._command.command),
                    cwd=cwd,
                    env={
                        **inherited_variables(self._command.environment),
                        **self._hold_variables(),
                        **lease,
                    },
                    stdin=item_json(session.item),
                    stdout=output.fileno(),
                    stderr=output.fileno(),
                )
            )

    def _hold_variables(self) -> dict[str, str]:
        """Return the pool's settings for `hold`, which hides them from the command."""
        settings, limit = self._settings, self._command.timeout or self._settings.session_timeout
        variables = {
            "WORKPOOL_WORKER_ID": settings.worker_id,
            "WORKPOOL_STOP_GRACE": str(self._command.grace),
            "WORKPOOL_REPORT_ERRORS": settings.report_errors,
            "WORKPOOL_LOG_LEVEL": settings.log_level,
            "WORKPOOL_LOG_FORMAT": settings.log_format,
        }
        if limit is not None:
            variables["WORKPOOL_SESSION_TIMEOUT"] = str(limit)
        if self._command.item_token:
            files: tuple[str, ...] = ("ca_file",)
        else:
            files = ("token_file", "api_key_file", "ca_file", "client_cert_file", "client_key_file")
            variables |= self._secret_variables()
        for name in files:
            if (path := getattr(settings, name)) is not None:
                variables[f"WORKPOOL_{name.upper()}"] = str(Path(path).absolute())
        return variables

    def _secret_variables(self) -> dict[str, str]:
        """Return the worker's credentials that are in no file."""
        settings, variables = self._settings, dict[str, str]()
        if settings.token_file is None:
            variables["WORKPOOL_TOKEN"] = settings.read_token()
        if settings.api_key is not None:
            variables["WORKPOOL_API_KEY"] = settings.api_key.get_secret_value()
        if headers := settings.extra_headers:
            values = {name: value.get_secret_value() for name, value in headers.items()}
            variables["WORKPOOL_EXTRA_HEADERS"] = json.dumps(values)
        return variables

    async def _detect_early_end(self, group: ProcessGroup, cwd: Path) -> None:
        """Fail early if `hold` ends before it has taken the item over.

        Raises:
            CommandFailed: `hold` can never run here.
            Release: `hold` has ended for another reason than the command.
        """
        await group.exited.wait()
        group.reap()
        problem = f"{exit_status_text(group.status)}; see {cwd / OUTPUT}"
        if group.status == UNUSABLE:
            raise CommandFailed("workpool hold", problem, group.status)
        if group.status not in ENDED:
            raise Release(f"workpool hold: {problem}")
