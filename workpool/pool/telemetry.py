"""Delivery of events to the metrics and to the plugins that observe them.

The metrics count an event on the thread on which it happened. An event object is built only for the
types that a plugin observes; other types cost nothing but the counting. Plugins are called on the
handlers' loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVarTuple, cast

from workpool.events import (
    AckFinished,
    CredentialRefreshed,
    HeartbeatFinished,
    ItemReceived,
    PluginFailed,
    PollFinished,
    RateBudgetWaited,
    RequestFinished,
    StopFinished,
)
from workpool.log_fields import pool_logger
from workpool.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from workpool.events import CallResult, Event, HeartbeatResult, Origin, PollResult, StopMode
    from workpool.metrics import PoolSnapshot
    from workpool.plugins import Plugins
    from workpool.pool.client_protocol import ClientProtocol
    from workpool.settings import Settings
    from workpool.wire.items import WorkItem

log = pool_logger(__name__)

Ts = TypeVarTuple("Ts")


def _log_poll_end(result: PollResult, seconds: float) -> None:
    log.debug("poll ended", extra={"result": result, "seconds": round(seconds, 3)})


def _log_received_item(item: WorkItem, origin: Origin, _: float | None) -> None:
    log.debug("item received", extra={"work_id": item.id, "origin": origin})


def _log_ack_end(item: WorkItem, result: CallResult, _: float, seconds: float) -> None:
    log.debug(
        "ack ended", extra={"work_id": item.id, "result": result, "seconds": round(seconds, 3)}
    )


def _log_heartbeat_end(item: WorkItem, result: HeartbeatResult, _: float) -> None:
    log.debug("heartbeat ended", extra={"work_id": item.id, "result": result})


def _log_stop_end(item: WorkItem, mode: StopMode, result: CallResult) -> None:
    log.debug("stop ended", extra={"work_id": item.id, "mode": mode, "result": result})


LOGGED: Final[tuple[tuple[type[Event], Callable[..., None]], ...]] = (
    (PollFinished, _log_poll_end),
    (ItemReceived, _log_received_item),
    (AckFinished, _log_ack_end),
    (HeartbeatFinished, _log_heartbeat_end),
    (StopFinished, _log_stop_end),
)
"""The events that are logged at level DEBUG; each function takes the values of their fields."""


class EventReporter(Protocol):
    """Reports an event: `observe(PollFinished, "item", 0.5)`."""

    def __call__(self, event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
        """Report an event by its type and the values of all its fields, in their order."""


class Telemetry:
    """Delivers the events of one pool to its metrics, its log and its plugins.

    The supervisor enters it first and leaves it last, so that no event is lost.
    """

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        registry: CollectorRegistry,
        snapshot: Callable[[], PoolSnapshot],
    ) -> None:
        self._plugins = plugins
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._metrics = Metrics(
            registry,
            str(settings.environment_id),
            worker_id=settings.worker_id,
            dialect=settings.dialect,
            version=version("workpool"),
            snapshot=snapshot,
            handlers=[
                route.handler.name for plugin in plugins.active_plugins() for route in plugin.routes
            ],
        )
        self.observe = cast("EventReporter", self._metrics.count)
        """Reports an event; may be called on any thread."""

    def __enter__(self) -> Telemetry:
        self._metrics.open()
        self._plugins.metrics = self._metrics.observe
        # Read the log level only once, so that polls and heartbeats spend no time on unlogged
        # events.
        if log.isEnabledFor(logging.DEBUG):
            for each, write in LOGGED:
                self._metrics.add_event_callback(each, write)
        # Leave out `PluginFailed`, because `Plugins` reports it to the observers directly.
        for event_type in self._plugins.wanted - {PluginFailed}:
            self._metrics.add_event_callback(event_type, partial(self._notify_plugins, event_type))
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def count_requests_of_client(self, client: ClientProtocol) -> None:
        """Set a client's callbacks, so that the metrics count its requests.

        The client may run on any event loop.
        """
        client.on_request = partial(self._metrics.count, RequestFinished)
        client.on_rate_limit_wait = partial(self._metrics.count, RateBudgetWaited)
        client.on_credential_refresh = partial(self._metrics.count, CredentialRefreshed)

    def _notify_plugins(self, event_type: Callable[..., Event], *values: Any) -> None:
        """Call the plugins that observe this type of event, on the thread of the handlers' loop."""
        event = event_type(*values)
        if threading.get_ident() == self._thread:
            self._plugins.notify_observers(event)
        else:
            # Plugins are called on the handlers' loop only; drop the event if that loop is closed.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._plugins.notify_observers, event)
