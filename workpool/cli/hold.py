"""`workpool hold`: run a program as a session, and extend the lease that a handler handed off.

The process outlives its parent: it has an operating system session of its own, and the end of the
parent's terminal does not end it. See workpool/docs/handlers.md, "Handing a session off".
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

import typer

from workpool.cli import exits, log_config
from workpool.cli.flags import BaseUrl, Config, EnvironmentId, FlagSettings
from workpool.cli.help_text import format_examples_section
from workpool.cli.program_plugin import ProgramPlugin
from workpool.cli.run import run_supervisor
from workpool.cli.signals import SignalEvents
from workpool.cli.verbosity import Verbose, is_verbose
from workpool.pool.handoff_child import HandoffChildSupervisor
from workpool.settings import Settings

WORK_ID: Final = "WORKPOOL_HOLD_WORK_ID"
LAST_HEARTBEAT: Final = "WORKPOOL_HOLD_LAST_HEARTBEAT"
TTL: Final = "WORKPOOL_HOLD_TTL"
SESSION_ID: Final = "WORKPOOL_HOLD_SESSION_ID"
GOOD: Final = frozenset({"completed", "stopped", "released"})
NO_EFFECT: Final = (
    "exit_after_sessions",
    "exit_after_idle",
    "exit_after_uptime",
    "stall_timeout",
)
"""Settings in the variables of a parent that have no effect in the child.

The child does not poll, and cannot see the progress of the program.
"""


EXAMPLES: Final = format_examples_section(
    "workpool hold -- ./train.sh --epochs 3",
    "workpool hold --work-id work_1 --last-heartbeat 2026-11-27T12:00:00Z sh -c 'sleep 60'",
)


class _HoldSettings(FlagSettings):
    """The settings of `workpool hold`, which come from its parent process.

    The options of the parent's plugins are left out, since this process does not run these plugins.
    """

    names: ClassVar = {"lease_ttl": "--ttl"}

    @property
    def plugin_options(self) -> Mapping[str, Mapping[str, Any]]:
        return {}


def hold(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.")],
    work_id: Annotated[
        str, typer.Option("--work-id", metavar="ID", envvar=WORK_ID, help="The id of the item.")
    ],
    last_heartbeat: Annotated[
        str,
        typer.Option(
            "--last-heartbeat",
            metavar="TIME",
            envvar=LAST_HEARTBEAT,
            help="The parent's last heartbeat.",
        ),
    ],
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl",
            metavar="SECONDS",
            envvar=TTL,
            help="The duration of the lease. Default: the setting `lease_ttl`.",
        ),
    ] = None,
    session_id: Annotated[
        str | None,
        typer.Option(
            "--session-id",
            metavar="ID",
            envvar=SESSION_ID,
            help="The id of its session, if the token is the item's own; the program gets it, too. "
            "Default: none.",
        ),
    ] = None,
    config: Config = None,
    environment_id: EnvironmentId = None,
    base_url: BaseUrl = None,
    _verbose: Verbose = False,
) -> None:
    """Run a program under the lease that a handler hands off.

    The command extends the lease, and ends the item when the program ends. The parent is a handler
    inside `session.handover()`. The command needs the variables of `lease.variables` and a token. A
    stop request and SIGTERM are passed on to the program.
    """
    # Remove the `WORKPOOL_HOLD_` variables, which Typer has read as options: reading the settings
    # fails for an unknown `WORKPOOL_` variable, and the program must not inherit them.
    for name in (WORK_ID, LAST_HEARTBEAT, TTL, SESSION_ID):
        os.environ.pop(name, None)
    with exits.exit_on_error():
        flags: dict[str, Any] = {
            "config": config,
            "environment_id": environment_id,
            "base_url": base_url,
            "lease_ttl": ttl,
        }
        settings = _HoldSettings(**{name: given for name, given in flags.items() if given})
        settings.require_connection()
    if not work_id or not last_heartbeat:
        raise typer.BadParameter("the item and its last heartbeat must not be empty")
    if shutil.which(command[0]) is None:
        raise typer.BadParameter(f"{command[0]}: no such program", param_hint="COMMAND")
    ignored = [name for name in NO_EFFECT if getattr(settings, name) is not None]
    # The parent process runs the plugins and serves the metrics: a second exporter could not listen
    # on the same port.
    settings = settings.replace(
        plugins=(),
        metrics_listen=None,
        concurrency=1,
        stats_interval=0,
        **dict.fromkeys(NO_EFFECT),
    )
    program = ProgramPlugin(command, make_item_token_variables(settings) if session_id else {})
    session = session_id or None
    pool = HandoffChildSupervisor(
        settings, work_id, last_heartbeat, plugins=[program], session_id=session
    )
    log_config.configure_logging(
        "debug" if is_verbose(context) else settings.log_level,
        settings.log_format,
        lambda: pool.log_ids,
    )
    if ignored:
        log_config.log.warning("hold: settings without effect: %s", ", ".join(ignored))
    _detach_from_parent()
    signals = SignalEvents(hangup_ends=False)
    status = run_supervisor(pool, signals)
    log_config.log.info("held", extra={"work_id": work_id, "outcome": program.outcome})
    not_taken = program.outcome is None and signals.first.is_set()
    if status == exits.OK and program.outcome not in GOOD and not not_taken:
        status = exits.FAILED
    raise typer.Exit(status)


def make_item_token_variables(settings: Settings) -> dict[str, str]:
    """Return the variables that let the program call the session's API with the item's token."""
    return {
        "WORKPOOL_BASE_URL": settings.base_url,
        "WORKPOOL_DIALECT": settings.dialect,
        "WORKPOOL_TOKEN": settings.read_token(),
    }


def _detach_from_parent() -> None:
    """Leave the parent's process group, so that signals to the group do not reach this process."""
    if hasattr(os, "setsid"):
        # `setsid` fails if this process already leads a process group of its own. Then the process
        # is not in the parent's group, so ignore the error.
        with contextlib.suppress(PermissionError):
            os.setsid()
        # Ignore SIGHUP with a function and not with SIG_IGN: the program would inherit SIG_IGN.
        signal.signal(signal.SIGHUP, lambda *_: None)
