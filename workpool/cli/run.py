"""`workpool run`: runs the pools of this process until a signal or an exit limit ends them.

Owns the signals, the kind of the event loop, the exit status, and the end of the process even if a
handler does not end. See workpool/docs/cli.md, "Signals".
"""

import asyncio
import functools
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from prometheus_client import CollectorRegistry, ProcessCollector

from workpool.cli import exits, log_config
from workpool.cli.control_socket import ControlSocket
from workpool.cli.flags import (
    Config,
    PluginNames,
    add_current_directory_to_path,
    add_setting_flags,
    read_environments,
    require_connection_settings,
)
from workpool.cli.help_text import format_examples_section
from workpool.cli.pool_interface import RunnablePool
from workpool.cli.signals import SignalEvents
from workpool.cli.systemd import ServiceReporter
from workpool.cli.verbosity import Verbose, is_verbose
from workpool.errors import WorkpoolError
from workpool.pool.lease_renewer import new_event_loop
from workpool.pool.supervisor import Supervisor
from workpool.settings import OFF, Settings

if TYPE_CHECKING:
    from workpool.cli.environment_group import EnvironmentGroup

METRICS_LISTEN: Final = "127.0.0.1:9464"
BLOCKING_THREADS: Final = "workpool-blocking"
TASKS_SECONDS: Final = 2.0
"""Seconds by which cancelled tasks of handlers may delay the end of the process."""
THREADS_SECONDS: Final = 2.0
"""Seconds by which threads, such as blocking code of cancelled handlers, may delay the end."""
EXAMPLES: Final = format_examples_section(
    "workpool run reports",
    "workpool run reports:daily_report --concurrency 16 --drain-timeout 60",
    "workpool run --config workpool.toml --metrics-listen :9464",
    "workpool run reports --exit-after-sessions 1 --exit-after-idle 60",
)


@add_setting_flags
def run(
    context: typer.Context,
    plugins: PluginNames = None,
    drain: Annotated[bool, typer.Option("--drain", help="Drain once the queue is empty.")] = False,
    config: Config = None,
    _verbose: Verbose = False,
    *,
    flags: Mapping[str, Any],
) -> None:
    """Run a pool until SIGTERM or SIGINT, which drain it.

    A second one ends it at once. SIGUSR1 pauses the claiming of items, SIGUSR2 resumes it.

    PLUGIN is an installed plugin, MODULE or MODULE:HANDLER; the current directory is searched.
    The credential has no flag: set WORKPOOL_TOKEN, or WORKPOOL_TOKEN_FILE.
    """
    with exits.exit_on_error():
        if is_verbose(context):
            flags = {**flags, "log_level": "debug"}
        settings, environments = read_environments(config, plugins=plugins, **flags)
        require_connection_settings(settings, environments)
        if settings.metrics_listen is None:
            settings = settings.replace(metrics_listen=METRICS_LISTEN)
        pool = _new_pool(settings, environments)
    signals = SignalEvents()
    log_config.configure_logging(settings.log_level, settings.log_format, lambda: pool.log_ids)
    add_current_directory_to_path()
    reporter = ServiceReporter(pool.status)
    if reporter.wanted:
        pool.renewer_services = [reporter.reporting_to_service_manager()]
    signals.on_user = functools.partial(_pause_or_resume, pool)
    with exits.exit_on_error():
        control = ControlSocket(settings.control_socket, settings.origin_of("control_socket"))
    control.environments = {} if isinstance(pool, Supervisor) else pool.members_by_id
    raise typer.Exit(run_supervisor(pool, signals, control, until_empty=drain))


def _new_pool(
    settings: Settings, environments: Sequence[Settings]
) -> "Supervisor | EnvironmentGroup":
    """Create one supervisor, or a group with one supervisor for each environment."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    if not environments:
        supervisor = Supervisor(settings, registry=registry)
        supervisor.awaits_last_scrape = True
        return supervisor
    from workpool.cli.environment_group import EnvironmentGroup  # noqa: PLC0415 - rarely needed

    return EnvironmentGroup(settings, environments, registry)


def _pause_or_resume(pool: RunnablePool, number: signal.Signals) -> None:
    if number == signal.SIGUSR1:
        pool.pause(number.name)
    else:
        pool.resume()


def run_supervisor(
    supervisor: RunnablePool,
    signals: SignalEvents,
    control: ControlSocket | None = None,
    *,
    until_empty: bool = False,
) -> int:
    """Run a pool on a new event loop and return the exit status.

    Args:
        supervisor: The pool or the pools, not started.
        signals: The signals that drain it, not entered.
        control: The socket that pauses, resumes and drains it, if any; not entered.
        until_empty: Whether to drain once the queue is empty.
    """
    supervisor.on_blocked = functools.partial(_end_process_after_failed_renewal, supervisor)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(
            _run_and_clean_up(
                supervisor, signals, control or ControlSocket(OFF), until_empty=until_empty
            )
        )


def _end_process_after_failed_renewal(supervisor: RunnablePool) -> None:
    """End the process with the status `FAILED`. Called when no thread renews the leases anymore.

    A failed pool drains by itself unless its loop is blocked. It has less time for that than the
    shortest lease. Called on the thread of the lease renewer.
    """
    failed = False
    try:
        failed = supervisor.status().error is not None
    finally:
        if failed:
            exits.schedule_process_end(exits.FAILED_SECONDS, exits.FAILED)
        else:
            exits.end_process_now(exits.FAILED)


async def _run_and_clean_up(
    supervisor: RunnablePool, signals: SignalEvents, control: ControlSocket, *, until_empty: bool
) -> int:
    executor = ThreadPoolExecutor(thread_name_prefix=BLOCKING_THREADS)
    asyncio.get_running_loop().set_default_executor(executor)
    status = await _run_pool_with_signals_and_control(
        supervisor, signals, control, until_empty=until_empty
    )
    executor.shutdown(wait=False, cancel_futures=True)
    left_tasks = supervisor.abandoned or await _cancel_remaining_tasks()
    sys.stdout.flush()
    if left_tasks:
        # Some tasks ignore their cancellation, and `asyncio.Runner` would wait for them without a
        # bound. So end the process here.
        exits.end_process_now(status)
    exits.end_process_if_threads_remain(THREADS_SECONDS, status)
    return status


async def _run_pool_with_signals_and_control(
    supervisor: RunnablePool, signals: SignalEvents, control: ControlSocket, *, until_empty: bool
) -> int:
    """Run the pool, obey signals and control requests, and return the exit status."""
    failure: WorkpoolError | None = None
    with signals, control:
        try:
            async with asyncio.TaskGroup() as group:
                obeying = group.create_task(
                    _drain_on_signals(signals, supervisor, asyncio.current_task()), name="signals"
                )
                serving = group.create_task(
                    control.answer_requests(supervisor), name="control-socket"
                )
                try:
                    await supervisor.run(until_empty=until_empty)
                except WorkpoolError as error:
                    failure = error
                finally:
                    obeying.cancel()
                    serving.cancel()
        except asyncio.CancelledError:
            if not signals.second.is_set():
                raise
    if signals.second.is_set() and signals.last is not None:
        return exits.SIGNALLED + signals.last
    if failure is not None:
        status = exits.find_exit_status(failure)
        trace = exits.find_plugin_exception_info(failure)
        for problem in exits.format_error_lines(failure):
            line = exits.append_advice_to_error_line(problem, failure, supervisor.settings)
            log_config.log.critical(
                "ended: %s", line, extra={"status": status, "error": line}, exc_info=trace
            )
        return status
    return exits.FAILED if supervisor.abandoned else exits.OK


async def _drain_on_signals(
    signals: SignalEvents, supervisor: RunnablePool, running: "asyncio.Task[int] | None"
) -> None:
    """Drain the pool on the first signal, and cancel the running pool on the second signal."""
    await signals.first.wait()
    supervisor.request_drain()
    await signals.second.wait()
    # A pool that hangs while it starts cannot drain, so the second signal cancels it.
    if running is not None:
        running.cancel()


async def _cancel_remaining_tasks() -> int:
    """Cancel the tasks that handlers left running; return how many ignore the cancellation."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    left = (await asyncio.wait(tasks, timeout=TASKS_SECONDS))[1] if tasks else set()
    for task in left:
        log_config.log.warning(
            "task ignores its cancellation; abandoned", extra={"task": task.get_name()}
        )
    return len(left)
