"""Delivery of events to the metrics and to the plugins that observe them.

The metrics count an event on the thread on which it happened. All other observers are called on the
handlers' loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from importlib.metadata import version
from typing import TYPE_CHECKING

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
        self.observe = plugins.notify
        """Deliver an event that happened on the handlers' loop."""

    def __enter__(self) -> Telemetry:
        self._metrics.open()
        self._plugins.metrics = self._metrics.observe
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def listen_to(self, client: Client) -> None:
        """Count the requests of a client, and deliver its events; for a client on any loop."""
        # An event object is made only if a plugin observes it: there are four requests per item.
        client.on_request = (
            self._request_finished if self._plugins.observers else self._metrics.request
        )
        client.on_rate_limit_wait = self._rate_limit_waited
        client.on_credential_refresh = self._credential_refreshed

    def observe_anywhere(self, event: Event) -> None:
        """Deliver an event that happened on any thread."""
        self._plugins.notify_metrics(event)
        if self._plugins.observers:
            self._forward(event)

    def _forward(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed
            self._loop.call_soon_threadsafe(self._plugins.notify_observers, event)

    def _request_finished(self, op: str, code: str, seconds: float) -> None:
        self._metrics.request(op, code, seconds)
        self._forward(RequestFinished(op, code, seconds))

    def _rate_limit_waited(self, kind: str, seconds: float) -> None:
        self.observe_anywhere(RateBudgetWaited("read" if kind == "read" else "write", seconds))

    def _credential_refreshed(self, result: str) -> None:
        self.observe_anywhere(CredentialRefreshed("ok" if result == "ok" else "error"))
