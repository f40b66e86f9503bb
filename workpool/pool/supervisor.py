"""The supervisor: opens the parts of one pool, runs them, drains them and closes them.

One root task owns the task groups, so that the cancellation of a caller cannot break them: the
cancellation starts a drain, and is raised after the drain.
See workpool/docs/architecture.md, "Threads and loops" and "The drain".
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
from contextvars import ContextVar, copy_context
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client import CollectorRegistry

from workpool.errors import PluginError, WorkpoolError, innermost
from workpool.events import PoolFailed
from workpool.log_fields import pool_log_ids_context, pool_logger
from workpool.metrics import PoolSnapshot
from workpool.plugins import Plugins
from workpool.plugins.lifespan import PluginLifespan
from workpool.pool.admission import Admission
from workpool.pool.bounded_queue import BoundedQueue
from workpool.pool.dispatcher import Dispatcher
from workpool.pool.drain import Drain, await_despite_cancellation
from workpool.pool.exit_limits import ExitLimits
from workpool.pool.handler_executor import open_handler_task_group
from workpool.pool.handler_threads import HandlerThreads
from workpool.pool.lease_renewer import LeaseRenewer, RenewerCallbacks
from workpool.pool.machine_pauses import lease_clock, wall_clock
from workpool.pool.poller import Poller, PollerGroup
from workpool.pool.pool_context import PoolContext
from workpool.pool.status import PoolView, Status, compute_worker_scaling_numbers, read_remote_stats
from workpool.pool.telemetry import Telemetry
from workpool.wire.client import WorkClient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from datetime import datetime
    from types import EllipsisType, TracebackType
    from typing import Self

    from workpool.errors import LeaseRenewerError
    from workpool.exporter import Exporter
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.pool.live_status import Counts
    from workpool.pool.machine_pauses import Clock
    from workpool.pool.pool_item import PoolItem
    from workpool.pool.shared_slots import SharedPoolResources
    from workpool.settings import Settings
    from workpool.wire.http.rate_limiter import RateLimits

log = pool_logger(__name__)

_NOT_STARTED = "the supervisor is not started; use `async with` or `run()`"

CLOSE_SECONDS = 30.0
"""Seconds in which exporter, lease renewer, plugins and connections must close."""
_RUNNING_IN: ContextVar[Supervisor | None] = ContextVar("workpool_supervisor", default=None)
"""The supervisor of the session to which the current code belongs."""


class Supervisor:
    """One worker pool: polls an environment's queue and runs its sessions.

    An async context manager; entering starts the pool, leaving drains it. It touches no signal
    handler, loop policy, logging configuration or global registry. One supervisor runs once.

    Args:
        settings: The settings; needs `environment_id` and a token.
        plugins: Objects, modules, classes, marked functions or names, asked before those that
            `settings.plugins` lists.
        registry: The registry of the metrics; None: a new one. May be shared.
        connect: Called with the settings to create a client, once on each event loop that uses one.
        rate_limits: The rate limits; None: new ones from the settings. One object may be given
            to several supervisors that use one account.

    Attributes:
        settings, registry: The settings, which do not change, and the registry of the metrics.
        abandoned: The number of sessions that the drain could neither end nor hand back.
        on_blocked: Called on another thread once leases are not renewed anymore: the loop has
            been blocked for `max_block`, or the thread that renews them failed (`status().error`).
        awaits_last_scrape: After the drain, the exporter stays until it is scraped once more, at
            most 20 s, if it was scraped in the last two minutes.
        renewer_services: Contexts that are open while leases are renewed, entered on the loop of
            the lease renewer once plugins and exporter are open. Set before the start.
        shared: The parts that the supervisor shares with others on the same event loop; None: the
            supervisor has parts of its own. Set before the start.
    """

    # These are class attributes so that the simulation can replace the renewer and the clocks.
    _renewer: ClassVar[type[LeaseRenewer]] = LeaseRenewer
    _clock: Clock = staticmethod(lease_clock)
    _wall: Clock = staticmethod(wall_clock)

    def __init__(
        self,
        settings: Settings,
        *,
        plugins: Sequence[object] = (),
        registry: CollectorRegistry | None = None,
        connect: Callable[[Settings], ClientProtocol] = WorkClient,
        rate_limits: RateLimits | None = None,
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.abandoned = 0
        self.on_blocked: Callable[[], None] | None = None
        self.renewer_services: Sequence[AbstractAsyncContextManager[object]] = ()
        self.awaits_last_scrape = False
        self.shared: SharedPoolResources | None = None
        self.settings = settings
        self._plugin_objects = plugins
        self._connect = connect
        self._rate_limits = rate_limits
        self._drain = Drain()
        self._admission = Admission(lambda: self._wall())  # noqa: PLW0108 - simulations set it later
        self._limits = ExitLimits(settings)
        self._until_empty = False
        self._worker_id = ""
        self._root: asyncio.Task[None] | None = None
        self._view: PoolView | None = None
        self._exporter: Exporter | None = None
        self._error: BaseException | None = None
        self._error_raised = False

    def __repr__(self) -> str:
        return f"<Supervisor of {self.settings.environment_id}>"

    async def __aenter__(self) -> Self:
        """Start the pool: plugins, lease renewer, exporter, then the pollers.

        Raises:
            SettingsError: A setting that is needed is missing.
            PluginError: A plugin cannot be used, or none can handle anything.
            ListenError: `metrics_listen` cannot be bound.
            RegistryError: The registry has another metric with the name of one of the pool's.
        """
        if self._root is not None:
            raise RuntimeError("a supervisor runs once; make a new one")
        self.settings.require_connection()
        # Each pool needs a name of its own: the control plane distinguishes workers by it.
        self._worker_id = f"{self.settings.worker_id}-{secrets.token_hex(4)}"
        with self._log_ids_context():
            for warning in self.settings.warnings():
                log.warning("%s", warning)
        self._plugins = Plugins.load(
            self._plugin_objects,
            self.settings.plugins,
            self.settings.plugin_options,
            self.settings.config_file,
        )
        if not self._plugins.can_supply_handler:
            raise PluginError(
                ", ".join(self.settings.plugins) or "(none)",
                "no plugin handles anything; name one in `plugins` or pass a handler",
            )
        if self._plugins.has_admission_hook:
            self._admission.set_plugin_refusal_function(
                functools.partial(self._plugins.admission_refusal_reason, self)
            )
        self._opened = asyncio.Event()
        self._sessions_ended = asyncio.Event()
        with self._log_ids_context():
            self._root = asyncio.get_running_loop().create_task(
                self._open_and_run_pool(), name="workpool"
            )
            self._root.add_done_callback(self._on_pool_ended)
        try:
            await self._opened.wait()
        except asyncio.CancelledError:
            self._drain.request(0)
            if not self._opened.is_set():
                # Cancel the root task: while it opens a connection, it does not notice the drain.
                self._root.cancel()
                # With this event set, `_wait_until_pool_closed` ends after `CLOSE_SECONDS`, even if
                # the task ignores its cancellation.
                self._sessions_ended.set()
            await await_despite_cancellation(self._wait_until_pool_closed, self._drain)
            raise
        if self._root.done():
            self._root.result()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drain the pool and close everything.

        If the `async with` block has raised an error, the drain cancels all handlers at once.

        Raises:
            WorkpoolError: The error that ended the pool, if `wait()` has not raised it.
        """
        self._drain.request(self.settings.drain_timeout if kind is None else 0)
        await await_despite_cancellation(self._wait_until_pool_closed, self._drain)
        if kind is None and not self._error_raised:
            self._raise_pool_error()

    async def run(self, *, until_empty: bool = False) -> None:
        """Start the pool, wait for its end, and close it.

        `until_empty`: drain once the queue is empty and no session runs.
        """
        self._until_empty = until_empty
        async with self:
            await self.wait()

    async def wait(self) -> None:
        """Wait until the pool has drained and closed.

        A cancellation ends this wait only; the pool goes on.

        Raises:
            WorkpoolError: The error that ended the pool.
        """
        await self._wait_until_pool_closed()
        self._raise_pool_error()

    async def drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Claim no more items, and wait until the running sessions have ended.

        Args:
            timeout: Seconds until the handlers that still run are cancelled and their items handed
                back; default the setting `drain_timeout`, 0 = now, None = no limit. A second call
                can only shorten it.

        Raises:
            RuntimeError: Called by a handler, for whose end the drain would wait.
        """
        root = self._require_pool_task()
        if _RUNNING_IN.get() is self:
            raise RuntimeError(
                "a handler cannot wait for the drain, which waits for the handler; "
                "call request_drain() instead"
            )
        self.request_drain(timeout)
        while not root.done() and not self._sessions_ended.is_set():
            await self._sessions_ended.wait()

    def request_drain(self, timeout: float | EllipsisType | None = ...) -> None:
        """Begin a drain and return at once. Handlers, too, may call this method."""
        if self._root is None:
            raise RuntimeError(_NOT_STARTED)
        self._drain.request(self.settings.drain_timeout if timeout is ... else timeout)

    def pause(self, reason: str, until: datetime | None = None) -> None:
        """Claim no more items until `resume()`; running sessions go on.

        May be called before the start. A further call replaces the reason and the end.

        Args:
            reason: Shown in the log, in `status()` and in `/readyz`.
            until: The time at which the pause ends by itself, with a time zone; None: only
                `resume()` ends it.

        Raises:
            ValueError: `until` has no time zone.
        """
        with self._log_ids_context():
            self._admission.pause(reason, until)
        if self._view is not None:
            self._view.dispatcher.forget_waiting_items()

    def resume(self) -> None:
        """End the pause of `pause()`, if there is one.

        The pool then claims items again, unless a plugin refuses.
        """
        with self._log_ids_context():
            self._admission.resume()

    def status(self) -> Status:
        """Return the current state of the pool. May be called on any thread and at any time."""
        view = self._view
        queue = view.context.queue if view else None
        reasons = tuple(self._unready_reasons())
        return Status(
            ready=not reasons,
            reasons=reasons,
            running=queue.running if queue else 0,
            waiting=queue.waiting_item_count if queue else 0,
            capacity=self.settings.concurrency + self.settings.prefetch,
            draining=self._drain.requested.is_set(),
            error=self._error,
            slots=self.settings.concurrency,
            claiming=view is not None and self._error is None and view.claiming,
            paused=self._admission.pause_reason is not None if view is None else view.paused,
            idle_seconds=view.idle_seconds if view else 0.0,
        )

    def unhealthy(self) -> list[str]:
        """Return the reasons why the process should be restarted. May be called on any thread."""
        return self._view.unhealthy_reasons() if self._view else []

    def live_status(
        self,
        show_ids: bool,  # noqa: FBT001 - a callback
        counts: Mapping[str, Counts] | None = None,
    ) -> dict[str, Any]:
        """Return the pool's state as JSON for the live page. May be called on any thread.

        Args:
            show_ids: Whether ids of items and sessions are included.
            counts: The result of `read_live_page_counters`; None: read the registry now.
        """
        from workpool.pool.live_status import live_status, read_live_page_counters  # noqa: PLC0415 - rarely needed

        worker = {
            "worker_id": self._worker_id,
            "environment_id": self.settings.environment_id or "",
            "version": version("workpool"),
        }
        if self._view is None:
            return {**worker, "reasons": self._unready_reasons()}
        counts = read_live_page_counters(self.registry) if counts is None else counts
        return live_status(self._view, counts, self._unready_reasons(), worker, show_ids=show_ids)

    @property
    def log_ids(self) -> dict[str, str]:
        """The ids that all log records of this pool have: `environment_id` and `worker_id`.

        The worker's id is new for each run; before the start there is none.
        """
        ids = {"environment_id": str(self.settings.environment_id), "worker_id": self._worker_id}
        return {name: value for name, value in ids.items() if value}

    @property
    def metrics_url(self) -> str | None:
        """The base URL of the exporter; None if the exporter is off.

        The exporter answers `/metrics`, `/healthz`, `/readyz` and `/scale`.
        """
        return self._exporter.url if self._exporter else None

    async def _open_and_run_pool(self) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._open_client_and_plugins(stack)
                context = await self._open_pool_context(stack)
                try:
                    await self._run_pool(context)
                finally:
                    self._sessions_ended.set()
        except BaseExceptionGroup as group:
            raise innermost(group) from None
        finally:
            self._sessions_ended.set()
            self._opened.set()

    async def _open_client_and_plugins(self, stack: contextlib.AsyncExitStack) -> None:
        """Open the pool's telemetry, client and plugins.

        They are opened before the lease renewer and closed after it, because it uses them.
        """
        settings = self.settings
        self._telemetry = stack.enter_context(
            Telemetry(settings, self._plugins, self.registry, self._take_pool_snapshot)
        )
        stack.push(self._report_failure)
        self._client = await stack.enter_async_context(self._new_client())
        for plugin, context in self._plugins.collect_lifespan_contexts(self):
            await stack.enter_async_context(PluginLifespan(plugin, context))
        log.info("pool started")

    def _report_failure(
        self, _: type[BaseException] | None, error: BaseException | None, __: object
    ) -> None:
        """Report the error that has ended the pool. All parts but the telemetry have closed."""
        error = self._error or error
        if isinstance(error, BaseExceptionGroup):
            error = innermost(error)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            self._telemetry.observe(PoolFailed, error)

    def _new_client(self) -> ClientProtocol:
        """Create a client of this pool for the running loop; its requests count in the metrics."""
        client = self._connect(self.settings)
        self._rate_limits = client.rate_limits = self._rate_limits or client.rate_limits
        client.worker_id = self._worker_id
        self._telemetry.count_requests_of_client(client)
        return client

    def _make_exporter(self) -> Exporter | None:
        """Return a new exporter of this pool.

        Returns None if the pool shares an exporter with other pools, or if the exporter is off.
        """
        settings = self.settings
        address = settings.metrics_address
        if self.shared is not None or address is None:
            return None
        from workpool.exporter import Exporter, LivePageSource  # noqa: PLC0415 - off when embedded, and slow

        exporter = Exporter(
            address.host or "",
            address.port,
            self.registry,
            health=self.unhealthy,
            readiness=self._unready_reasons,
            live_page=LivePageSource(self.live_status, settings.live_page_ids == "always"),
        )
        exporter.scale = lambda: compute_worker_scaling_numbers(self.status())
        return exporter

    async def _open_pool_context(self, stack: contextlib.AsyncExitStack) -> PoolContext:
        """Start the lease renewer, with the exporter on its loop, and build the pool context.

        Overridden by pools of tests, which observe or replace parts of the context.
        """
        settings = self.settings
        exporter = self._make_exporter()
        self._exporter = exporter if self.shared is None else self.shared.exporter
        services: list[AbstractAsyncContextManager[object]] = []
        if exporter is not None:
            services.append(exporter)
        services += self.renewer_services
        callbacks = RenewerCallbacks(
            observe=self._telemetry.observe,
            changed=self._on_lease_changed,
            failed=self._on_renewer_failed,
            stopped_renewing=self._on_renewer_stopped,
        )
        renewer = self._renewer(
            settings, self._clock, self._wall, self._new_client, callbacks, services
        )
        await stack.enter_async_context(renewer)
        if exporter is not None:
            log.info("metrics served", extra={"url": f"{exporter.url}/metrics"})
        threads = HandlerThreads(settings.concurrency, self._clock)
        stack.push_async_callback(threads.close_threads)
        start_context = copy_context()
        start_context.run(_RUNNING_IN.set, self)
        return PoolContext(
            settings=settings,
            client=self._client,
            plugins=self._plugins,
            renewer=renewer,
            queue=BoundedQueue(
                settings.concurrency,
                settings.prefetch,
                settings.exit_after_sessions,
                None if self.shared is None else self.shared.slots,
            ),
            clock=self._clock,
            observe=self._telemetry.observe,
            start_context=start_context,
            threads=threads,
            drain_deadline=lambda: self._drain.deadline,
            admission=self._admission,
            optional=renewer.optional,
        )

    async def _run_pool(self, context: PoolContext) -> None:
        """Poll and run items until a drain is requested, then wait for the end of the drain."""
        async with open_handler_task_group() as handlers, asyncio.TaskGroup() as working:
            group = PollerGroup(
                context,
                until_empty=self._until_empty,
                on_fatal=self._drain_after_error,
                on_empty=functools.partial(self._drain.request, self.settings.drain_timeout),
            )
            dispatcher = Dispatcher(context, working, handlers, group.record_ack_result)
            pollers = [
                Poller(context, group, dispatcher, number)
                for number in range(self.settings.pollers)
            ]
            if self.shared is not None:
                self._limits = self.shared.limits
            if self._limits.has_exit_limit:
                dispatcher.runner.on_claimed = self._limits.record_claimed_session
                group.on_poll = self._limits.include_pool_in_idle_limit(self._admission)
            self._view = PoolView(context, dispatcher, group, pollers, self._drain, self._limits)
            async with asyncio.TaskGroup() as fetching:
                tasks = [
                    fetching.create_task(poller.run_polls(), name=f"poller-{number}")
                    for number, poller in enumerate(pollers)
                ]
                if self.settings.stats_interval:
                    reading = read_remote_stats(context)
                    tasks.append(fetching.create_task(reading, name="remote-stats"))
                if self._limits.has_exit_limit:
                    ending = self._end_pool_at_exit_limit(dispatcher, tasks[: len(pollers)])
                    tasks.append(fetching.create_task(ending, name="limits"))
                self._opened.set()
                await self._wait_for_drain_request(dispatcher)
                dispatcher.begin_drain()
                for task in tasks:
                    task.cancel()
            self.abandoned = await self._drain.finish_sessions(context, dispatcher)
            if self.awaits_last_scrape and self._exporter is not None:
                await self._drain.wait_for_last_scrape(self._exporter)

    async def _wait_for_drain_request(self, dispatcher: Dispatcher) -> None:
        """Wait until a drain is requested; then forget the items that wait for a slot.

        An error or a cancellation that ends the wait has the same effect.
        """
        try:
            await self._drain.requested.wait()
        finally:
            self._limits.exclude_pool_from_idle_limit(self._admission)
            dispatcher.forget_waiting_items()

    async def _end_pool_at_exit_limit(
        self, dispatcher: Dispatcher, polling: Sequence[asyncio.Task[None]]
    ) -> None:
        """Stop claiming when an exit limit is reached; end the pool once no session runs.

        Unlike in a drain, sessions are not asked to end and have no time limit. A drain can still
        be requested meanwhile.
        """
        limit = await self._limits.wait_for_exit_limit()
        for task in polling:
            task.cancel()
        dispatcher.forget_waiting_items()
        running = dispatcher.count_unfinished_items()
        log.info(
            "limit reached; no more items are claimed", extra={"limit": limit, "running": running}
        )
        await self._drain.wait_until_sessions_end(dispatcher)
        self._drain.request(None)

    def _drain_after_error(self, error: BaseException) -> None:
        """Begin a drain, and record `error`: the pool raises its first error after the drain."""
        if self._error is None:
            self._error = error
        self._drain.request(self.settings.drain_timeout)

    def _log_ids_context(self) -> AbstractContextManager[None]:
        """Return a context manager that adds the pool's ids to the log records made inside it."""
        return pool_log_ids_context(self.log_ids)

    def _require_pool_task(self) -> asyncio.Task[None]:
        if self._root is None:
            raise RuntimeError(_NOT_STARTED)
        return self._root

    async def _wait_until_pool_closed(self) -> None:
        """Wait until the pool has closed: until the task of `_open_and_run_pool` has ended.

        Once all sessions have ended, the wait takes `CLOSE_SECONDS` at most.
        """
        root = self._require_pool_task()
        await self._sessions_ended.wait()
        # If the task is done, do not call `asyncio.wait`: it would yield to the loop once, and a
        # cancellation could be raised at that point.
        if not root.done():
            await asyncio.wait({root}, timeout=CLOSE_SECONDS)
        if not root.done():
            with self._log_ids_context():
                log.critical("pool did not close; abandoned", extra={"seconds": CLOSE_SECONDS})

    def _on_pool_ended(self, root: asyncio.Task[None]) -> None:
        self._error = self._error or (None if root.cancelled() else root.exception())
        if self._error is not None and self._view is not None:
            # An error before the pool has started is raised by `__aenter__`, and not logged here.
            bug = not isinstance(self._error, WorkpoolError)
            log.critical(
                "pool failed: %s",
                self._error,
                extra={"error": str(self._error)},
                exc_info=self._error if bug else None,
            )

    def _raise_pool_error(self) -> None:
        """Raise the error that ended the pool, if any."""
        if self._error is not None:
            self._error_raised = True
            raise self._error

    def _on_lease_changed(self, item: PoolItem) -> None:
        if self._view is not None:
            self._view.dispatcher.runner.handle_lease_change(item)

    def _on_renewer_failed(self, error: LeaseRenewerError) -> None:
        self._drain_after_error(error)
        self._drain.request(0)

    def _on_renewer_stopped(self, error: LeaseRenewerError | None) -> None:
        self._error = self._error or error
        if self.on_blocked is not None:
            self.on_blocked()

    def _take_pool_snapshot(self) -> PoolSnapshot:
        return self._view.snapshot() if self._view else PoolSnapshot()

    def _unready_reasons(self) -> list[str]:
        reasons = [f"failed: {type(self._error).__name__}"] if self._error else []
        return reasons + (self._view.unready_reasons() if self._view else ["not started"])
