"""Runs several environments in one process, with one supervisor for each.

The supervisors run on one event loop. Each has its own lease renewer, clients and plugins. They
share the slots, the exit limits, the registry and its exporter, and the rate limits of one account.
The failure of one environment does not end the others: the environment starts again after a while.
The process ends once no environment runs. See workpool/docs/operating.md, "Several environments".
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from workpool.cli import exits
from workpool.cli.log_config import log
from workpool.cli.rate_limit_groups import find_shared_rate_limits
from workpool.cli.service_thread import ServiceThread
from workpool.errors import PluginError, SettingsError, WorkpoolError
from workpool.pool.exit_limits import ExitLimits
from workpool.pool.shared_slots import SharedPoolResources, SharedSlots
from workpool.pool.status import Status, compute_worker_scaling_numbers
from workpool.pool.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import EllipsisType

    from prometheus_client import CollectorRegistry

    from workpool.exporter import Exporter
    from workpool.settings import Settings

RETRY_SECONDS: Final = 60.0
"""Seconds from the failure of an environment to its next start."""


class GroupMember:
    """One environment of the process. Each restart of the environment creates a new supervisor.

    Attributes:
        settings: The settings of the environment.
        supervisor: The supervisor that runs now or ran last.
        error: The error that ended the last supervisor; None if it has not failed.
        running: Whether the supervisor runs.
        opened: Whether a supervisor has opened its plugins and its lease renewer.
        ended: Whether no further supervisor will run.
        drained: Whether a drain was requested.
        on_drain: Called when a drain is requested.
    """

    def __init__(self, settings: Settings, create: Callable[[Settings], Supervisor]) -> None:
        self.settings = settings
        self.supervisor = create(settings)
        self.error: Exception | None = None
        self.running = self.opened = self.ended = self.drained = False
        self.on_drain: Callable[[], object] | None = None
        self._create = create
        self._pause_reason: str | None = None
        self._abandoned = 0

    @property
    def abandoned(self) -> int:
        """The number of sessions that drains of this environment could neither end nor release."""
        return self._abandoned + self.supervisor.abandoned

    @property
    def environment_id(self) -> str:
        """The id of the environment."""
        return str(self.settings.environment_id)

    @property
    def unready_reasons(self) -> Iterator[str]:
        """The reasons why this environment is not ready; none if it has ended without a failure."""
        if self.error is not None and not self.running:
            yield f"{self.environment_id}: failed: {type(self.error).__name__}"
        elif not self.ended:
            yield from (
                f"{self.environment_id}: {reason}" for reason in self.supervisor.status().reasons
            )

    async def run(self, *, until_empty: bool) -> None:
        """Run the supervisor until it ends, and store its failure in `error`."""
        # After a failure, the restart needs a new supervisor, because a supervisor runs only once.
        if self.error is not None:
            self._abandoned += self.supervisor.abandoned
            self.supervisor = self._create(self.settings)
            if self._pause_reason is not None:
                self.supervisor.pause(self._pause_reason)
        self.running = True
        try:
            await self.supervisor.run(until_empty=until_empty)
            self.error = None
        except Exception as error:  # noqa: BLE001 - also of a plugin, which must not end the others
            self.error = error
        finally:
            self.running = False

    def pause(self, reason: str) -> None:
        """Stop claiming items until `resume()`, also after a restart of the environment."""
        self._pause_reason = reason
        self.supervisor.pause(reason)

    def resume(self) -> None:
        """Claim items again after `pause()`."""
        self._pause_reason = None
        self.supervisor.resume()

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Begin a drain without waiting for its end; the environment does not start again."""
        self.drained = True
        if self.running:
            self.supervisor.request_drain(timeout)
        if self.on_drain is not None:
            self.on_drain()

    def status(self) -> Status:
        """Return the status of the supervisor that runs now or ran last."""
        return self.supervisor.status()


class EnvironmentGroup:
    """Runs several environments in one process, and has the interface of a single supervisor.

    Args:
        process: The settings of the process.
        environments: The settings of each environment.
        registry: The registry of all metrics.

    Raises:
        SettingsError: Environments that share rate limits have different ones, or a credential
            cannot be read.

    Attributes:
        environments: The environments, in the order of the file.
        settings: The settings of the process; after a failure, those of the environment that
            failed.
        abandoned: The number of sessions that drains could neither end nor hand back.
        on_blocked: See `Supervisor.on_blocked`.
        renewer_services: Contexts that are open on a thread of their own, as soon as each
            environment has opened or failed.
    """

    def __init__(
        self, process: Settings, environments: Sequence[Settings], registry: CollectorRegistry
    ) -> None:
        self.settings = process
        self.on_blocked: Callable[[], None] | None = None
        self.renewer_services: Sequence[AbstractAsyncContextManager[object]] = ()
        self._process = process
        self._registry = registry
        self._rate_limits = find_shared_rate_limits(environments)
        self._slots = SharedSlots(process.concurrency, process.exit_after_sessions)
        self._limits = ExitLimits(process)
        self._exporter = self._create_exporter()
        self._shares = {
            each.environment_id: self._slots.add_environment_share() for each in environments
        }
        self._changed = asyncio.Event()
        self.environments = [GroupMember(each, self._create_supervisor) for each in environments]
        for each in self.environments:
            each.on_drain = self._wake_waiters

    @property
    def log_ids(self) -> dict[str, str]:
        """Return no ids: a log record from outside of a pool's tasks belongs to no environment."""
        return {}

    @property
    def abandoned(self) -> int:
        """The number of sessions that drains of all environments could neither end nor release."""
        return sum(each.abandoned for each in self.environments)

    async def run(self, *, until_empty: bool = False) -> None:
        """Run all environments until each has drained.

        Raises:
            Exception: The error of the first environment that has failed and not recovered, mostly
                a `WorkpoolError`.
        """
        self._loop = asyncio.get_running_loop()
        exporter = [] if self._exporter is None else [self._exporter]
        async with ServiceThread(exporter), asyncio.TaskGroup() as group:
            if self.renewer_services:
                group.create_task(self._keep_services_open(), name="services")
            if self._exporter is not None:
                log.info("metrics served", extra={"url": f"{self._exporter.url}/metrics"})
            for each in self.environments:
                group.create_task(
                    self._run_environment_with_restarts(each, until_empty=until_empty),
                    name=each.environment_id,
                )
        for each in self.environments:
            if each.error is not None:
                self.settings = each.settings
                raise each.error

    @property
    def members_by_id(self) -> dict[str, GroupMember]:
        """The members of this group, with the ids of their environments as keys."""
        return {each.environment_id: each for each in self.environments}

    def pause(self, reason: str) -> None:
        """Stop claiming items in all environments until `resume()`."""
        for each in self.environments:
            each.pause(reason)

    def resume(self) -> None:
        """Claim items again in all environments."""
        for each in self.environments:
            each.resume()

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Begin a drain of all environments without waiting for its end."""
        for each in self.environments:
            each.request_drain(timeout)

    def status(self) -> Status:
        """Return the status of all environments as one status. May be called on any thread.

        The error of an environment is part of the state only if no environment runs.
        """
        reasons = self._find_readiness_problems()
        found = [each.status() for each in self.environments]
        slots = self._process.concurrency
        return Status(
            ready=not reasons,
            reasons=tuple(reasons),
            running=sum(each.running for each in found),
            waiting=sum(each.waiting for each in found),
            capacity=slots,
            draining=all(each.draining for each in found),
            error=None
            if any(each.running for each in self.environments)
            else self._find_first_environment_error,
            slots=slots,
            claiming=any(each.claiming for each in found),
            paused=all(each.paused for each in found),
            idle_seconds=min(each.idle_seconds for each in found),
        )

    @property
    def metrics_url(self) -> str | None:
        """The base URL of the exporter, without `/metrics`; None if there is no exporter."""
        return self._exporter.url if self._exporter else None

    def live_status(self, show_ids: bool) -> dict[str, Any]:
        """Return the data for the worker's page in a browser. May be called on any thread."""
        from workpool.pool.live_status import merge_statuses, read_live_page_counters  # noqa: PLC0415 - rarely needed

        counts = read_live_page_counters(self._registry)
        found = [each.supervisor.live_status(show_ids, counts) for each in self.environments]
        names = {"worker_id": self._process.worker_id, "version": found[0]["version"]}
        return merge_statuses(
            names, found, self._process.concurrency, self._find_readiness_problems()
        )

    @property
    def _find_first_environment_error(self) -> Exception | None:
        """The error of the first failed environment; None if no environment has failed."""
        return next((each.error for each in self.environments if each.error is not None), None)

    async def _run_environment_with_restarts(self, one: GroupMember, *, until_empty: bool) -> None:
        """Run one environment, and restart it after a failure while other environments run."""
        while not one.drained:
            await one.run(until_empty=until_empty)
            if one.error is None:
                break
            self._log_environment_failure(one, one.error)
            if isinstance(one.error, SettingsError | PluginError) and not one.opened:
                # Wrong settings or plugins would also fail every restart, so end the process.
                self.request_drain()
            if until_empty or not await self._wait_to_restart(one):
                break
        one.ended = True
        self._shares[one.environment_id].release_reserved_slot()
        self._wake_waiters()

    async def _keep_services_open(self) -> None:
        """Open `renewer_services` after each environment has started or failed.

        Close them after all environments have ended.
        """
        while not all(each.opened or each.ended or each.error for each in self.environments):
            await self._changed.wait()
        async with ServiceThread(self.renewer_services):
            while not all(each.ended for each in self.environments):
                await self._changed.wait()

    @asynccontextmanager
    async def _mark_environment_opened_on_entry(
        self, environment_id: str | None
    ) -> AsyncIterator[None]:
        """Return a context that marks an environment as opened on entry.

        The lease renewer of the environment enters the context when it starts.
        """
        self._loop.call_soon_threadsafe(self._mark_environment_opened, str(environment_id))
        yield

    def _mark_environment_opened(self, environment_id: str) -> None:
        self.members_by_id[environment_id].opened = True
        self._wake_waiters()

    async def _wait_to_restart(self, one: GroupMember) -> bool:
        """Wait for `RETRY_SECONDS`, then return whether the failed environment may restart.

        The wait ends early when a restart is not allowed anymore.
        """
        self._wake_waiters()
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                while self._is_restart_allowed(one):
                    await self._changed.wait()
        return self._is_restart_allowed(one)

    def _is_restart_allowed(self, one: GroupMember) -> bool:
        others = any(each.running for each in self.environments if each is not one)
        return others and not one.drained and self._limits.reached is None

    def _wake_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _log_environment_failure(self, one: GroupMember, error: Exception) -> None:
        for problem in exits.format_error_lines(error):
            line = exits.append_advice_to_error_line(problem, error, one.settings)
            log.critical(
                "environment failed: %s",
                line,
                extra={"environment_id": one.environment_id, "error": line},
                exc_info=exits.find_plugin_exception_info(error)
                if isinstance(error, WorkpoolError)
                else error,
            )

    def _create_supervisor(self, settings: Settings) -> Supervisor:
        supervisor = Supervisor(
            settings,
            registry=self._registry,
            rate_limits=self._rate_limits[settings.environment_id],
        )
        share = self._shares[settings.environment_id]
        supervisor.shared = SharedPoolResources(share, self._limits, self._exporter)
        supervisor.awaits_last_scrape = True
        supervisor.renewer_services = [
            self._mark_environment_opened_on_entry(settings.environment_id)
        ]
        supervisor.on_blocked = partial(self._handle_renewal_failure, supervisor)
        return supervisor

    def _handle_renewal_failure(self, supervisor: Supervisor) -> None:
        """End the process if an environment whose leases are not renewed anymore cannot drain.

        If the lease renewer failed and the loop is not blocked, the environment drains by itself
        and the others go on. The process ends if that drain takes longer than the shortest lease
        allows. Called on the thread of the lease renewer.
        """
        # This method is called only if leases are not renewed anymore. If the supervisor has no
        # error, the cause is a blocked event loop, which cannot drain: end the process.
        if supervisor.status().error is None:
            self._end_process()
            return
        seconds = exits.FAILED_SECONDS
        timer = threading.Timer(seconds, self._end_process_unless_drained, (supervisor,))
        timer.daemon = True
        try:
            timer.start()
        except BaseException:
            self._end_process()
            raise

    def _end_process_unless_drained(self, supervisor: Supervisor) -> None:
        if supervisor.status().running:
            self._end_process()

    def _end_process(self) -> None:
        if self.on_blocked is not None:
            self.on_blocked()

    def _create_exporter(self) -> Exporter | None:
        """Create the exporter; return None if `metrics_listen` is off.

        The threads of the exporter call methods of this group.
        """
        address = self._process.metrics_address
        if address is None:
            return None
        from workpool.exporter import Exporter, LivePageSource  # noqa: PLC0415 - may be off, and slow

        exporter = Exporter(
            address.host or "",
            address.port,
            self._registry,
            health=self._find_health_problems,
            readiness=self._find_readiness_problems,
            live_page=LivePageSource(self.live_status, self._process.live_page_ids == "always"),
        )
        exporter.scale = lambda: compute_worker_scaling_numbers(self.status())
        return exporter

    def _find_health_problems(self) -> list[str]:
        # A failed environment does not make the process unhealthy: a restart of the process would
        # not repair the environment, and would interrupt the others.
        reasons = (each.supervisor.unhealthy() for each in self.environments if each.running)
        return list(dict.fromkeys(reason for each in reasons for reason in each))

    def _find_readiness_problems(self) -> list[str]:
        return [reason for each in self.environments for reason in each.unready_reasons]
