"""Detached commands, which continue to run after the worker's end.

For each of them, a `workpool hold` process runs the command and extends its lease.

A handoff that fails needs no clean-up. `hold` starts the command only after its first heartbeat has
succeeded, and that heartbeat is refused as soon as the pool holds the lease again.
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
from workpool_command.command_inputs import (
    encode_item_as_json,
    inherited_environment_variables,
    redelivery_environment_variables,
    trace_context_environment_variables,
)
from workpool_command.command_result import (
    CommandFailed,
    describe_exit_status,
    release_or_fail_on_start_error,
)
from workpool_command.process_group import CommandArguments, ProcessGroup, start_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from workpool import Session, Settings

OUTPUT_FILE: Final = "output.log"
"""The name of the file in the session's directory with the output of `hold` and the command."""
TAKEN_OVER_STATUSES: Final = {0, 1}
"""The exit statuses of a `hold` process that may have taken the lease over."""
USAGE_ERROR_STATUS: Final = 2
"""The exit status of a `hold` process with wrong settings."""


class DetachedCommandSettings(Protocol):
    """The subset of the settings of the plugin class `Command` that a detached command needs."""

    command: Sequence[str]
    environment: Sequence[str]
    grace: float
    item_token: bool
    timeout: float | None


class WorkpoolHoldStarter:
    """Starts a `workpool hold` process for each session, and reaps each process after its exit."""

    def __init__(self, command: DetachedCommandSettings, settings: Settings) -> None:
        self._command = command
        self._settings = settings
        # Use weak references. Otherwise each group would stay in memory after its leader's exit.
        self._groups: WeakSet[ProcessGroup] = WeakSet()

    def close(self) -> None:
        """Stop watching the `workpool hold` processes, which outlive the worker."""
        for group in list(self._groups):
            group.stop_watching_leader()

    async def hand_off_session(self, session: Session, cwd: Path) -> None:
        """Start the command under `workpool hold`, and wait until `hold` has taken the lease over.

        Raises:
            CommandFailed: `hold` cannot start with these settings.
            Release: `hold` cannot run now, or did not take the lease over in time.
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
                    lease_variables = lease.keyless_variables if keyless else lease.variables
                    group = self._start_workpool_hold(session, cwd, lease_variables)
                    early_end = tasks.create_task(
                        self._raise_on_early_exit(group, cwd), name="hold"
                    )
                early_end.cancel()
        except BaseExceptionGroup as failure:
            error = innermost(failure)
            if group is None or not isinstance(error, HandoverError):
                raise error from error.__cause__
            # Kill the `hold` process. The pool owns the lease again, so the heartbeats of `hold`
            # would be refused.
            group.send_signal(signal.SIGKILL)
            raise Release("workpool hold was not ready in time") from error
        finally:
            if group is not None:
                self._groups.add(group)
                group.reap_leader_on_exit()

    def _start_workpool_hold(
        self, session: Session, cwd: Path, lease_variables: Mapping[str, str]
    ) -> ProcessGroup:
        # With -P, Python imports no modules from the directory `cwd`, which the session can write.
        hold = (sys.executable, "-P", "-m", "workpool", "hold", "--")
        variables = {
            **redelivery_environment_variables(session),
            **trace_context_environment_variables(session),
        }
        assignments = [f"{name}={value}" for name, value in variables.items()]
        with (
            release_or_fail_on_start_error("workpool hold"),
            (cwd / OUTPUT_FILE).open("ab") as output,
        ):
            return start_group(
                CommandArguments(
                    argv=(*hold, "env", *assignments, *self._command.command),
                    cwd=cwd,
                    env={
                        **inherited_environment_variables(self._command.environment),
                        **self._workpool_hold_variables(),
                        **lease_variables,
                    },
                    stdin=encode_item_as_json(session.item),
                    stdout=output.fileno(),
                    stderr=output.fileno(),
                )
            )

    def _workpool_hold_variables(self) -> dict[str, str]:
        """Return environment variables with the pool's settings for `workpool hold`.

        `workpool hold` removes them from the environment of the command.
        """
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
            variables |= self._credential_variables()
        for name in files:
            if (path := getattr(settings, name)) is not None:
                variables[f"WORKPOOL_{name.upper()}"] = str(Path(path).absolute())
        return variables

    def _credential_variables(self) -> dict[str, str]:
        """Return variables with those credentials of the worker that are not in files."""
        settings, variables = self._settings, dict[str, str]()
        if settings.token_file is None:
            variables["WORKPOOL_TOKEN"] = settings.read_token()
        if settings.api_key is not None:
            variables["WORKPOOL_API_KEY"] = settings.api_key.get_secret_value()
        if headers := settings.extra_headers:
            values = {name: value.get_secret_value() for name, value in headers.items()}
            variables["WORKPOOL_EXTRA_HEADERS"] = json.dumps(values)
        return variables

    async def _raise_on_early_exit(self, group: ProcessGroup, cwd: Path) -> None:
        """Wait for the exit of `hold`, and raise an error if it has not taken the lease over.

        Raises:
            CommandFailed: The settings of `hold` are wrong.
            Release: `hold` has failed for another reason.
        """
        await group.exited.wait()
        group.reap_leader()
        problem = f"{describe_exit_status(group.status)}; see {cwd / OUTPUT_FILE}"
        if group.status == USAGE_ERROR_STATUS:
            raise CommandFailed("workpool hold", problem, group.status)
        if group.status not in TAKEN_OVER_STATUSES:
            raise Release(f"workpool hold: {problem}")
