"""Delivery of events to the metrics and to the plugins that observe them.

The metrics count an event on the thread on which it happened. An event object is built only for the
types that a plugin observes; other types cost nothing but the counting. Plugins are called on the
handlers' loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, TypeVarTuple, cast

from workpool.events import (
    CredentialRefreshed,
    PluginFailed,
    RateBudgetWaited,
    RequestFinished,
)
from workpool.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from workpool.events import Event
    from workpool.metrics import PoolSnapshot
    from workpool.plugins import Plugins
    from workpool.pool.client_protocol import ClientProtocol
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
                route.handler.name for plugin in plugins.describe() for route in plugin.routes
            ],
        )
        self.observe = cast("Observe", self._metrics.count)
        """Reports an event; may be called on any thread."""

    def __enter__(self) -> Telemetry:
        self._metrics.open()
        self._plugins.metrics = self._metrics.observe
        for event_type in self._plugins.wanted - {PluginFailed}:  # the plugins report that one
            self._metrics.forward(event_type, partial(self._notify, event_type))
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def listen_to(self, client: ClientProtocol) -> None:
        """Report the requests of a client; it may live on any loop."""
        client.on_request = partial(self._metrics.count, RequestFinished)
        client.on_rate_limit_wait = partial(self._metrics.count, RateBudgetWaited)
        client.on_credential_refresh = partial(self._metrics.count, CredentialRefreshed)

    def _notify(self, event_type: Callable[..., Event], *values: Any) -> None:
        """Call the plugins that observe this type: now, or soon if this is another thread."""
        event = event_type(*values)
        if threading.get_ident() == self._thread:
            self._plugins.notify(event)
        else:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                self._loop.call_soon_threadsafe(self._plugins.notify, event)
