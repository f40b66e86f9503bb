"""Delivery of events to the metrics and to the plugins that observe them.

The metrics count an event on the thread on which it happened. An event object is built only for the
types that a plugin observes; plugins are called on the handlers' loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, TypeVarTuple, cast

from workpool.events import CredentialRefreshed, RateBudgetWaited, RequestFinished
from workpool.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from workpool.events import Event
    from workpool.metrics import PoolSnapshot
    from workpool.plugins import Plugins
    from workpool.pool.client import Client
    from workpool.settings import Settings

Ts = TypeVarTuple("Ts")


class Observe(Protocol):
    """Reports an event: `observe(PollFinished, "item", 0.5)`."""

    def __call__(self, event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
        """Report an event by its type and the values of all its fields, in their order."""


class Telemetry:
    """Delivers the events of one supervisor; a context that is open while its loops run."""

    def __init__(
        self,
        settings: Settings,
        plugins: Plugins,
        registry: CollectorRegistry,
        snapshot: Callable[[], PoolSnapshot],
    ) -> None:
        self._plugins = plugins
        self._wanted: frozenset[object] = plugins.wanted
        self._loop = asyncio.get_running_loop()
        self._metrics = Metrics(
            registry,
            str(settings.environment_id),
            dialect=settings.dialect,
            version=version("workpool"),
            snapshot=snapshot,
            handlers=[
                route.handler.name for plugin in plugins.describe() for route in plugin.routes
            ],
        )
        self._count = self._metrics.count

    def __enter__(self) -> Telemetry:
        self._metrics.open()
        self._plugins.metrics = self._metrics.observe
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def listen_to(self, client: Client) -> None:
        """Report the requests of a client; it may live on any loop."""
        client.on_request = partial(cast("Any", self.observe_anywhere), RequestFinished)
        client.on_rate_limit_wait = self._rate_limit_waited
        client.on_credential_refresh = self._credential_refreshed

    def observe(self, event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
        """Report an event that happened on the handlers' loop."""
        self._count(event_type, values)
        if event_type in self._wanted:
            self._plugins.notify(event_type(*values))

    def observe_anywhere(self, event_type: Callable[[*Ts], Event], /, *values: *Ts) -> None:
        """Report an event that happened on any thread."""
        self._count(event_type, values)
        if event_type in self._wanted:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                self._loop.call_soon_threadsafe(self._plugins.notify, event_type(*values))

    def _rate_limit_waited(self, kind: str, seconds: float) -> None:
        self.observe_anywhere(RateBudgetWaited, "read" if kind == "read" else "write", seconds)

    def _credential_refreshed(self, result: str) -> None:
        self.observe_anywhere(CredentialRefreshed, "ok" if result == "ok" else "error")
