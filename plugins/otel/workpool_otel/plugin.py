"""The plugin class `Otel`: its settings, its tracer provider, and the hooks that record spans."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from workpool import DaemonThreads, PluginError, Session, Supervisor, hookimpl
from workpool.errors import ControlPlaneError
from workpool_otel.spans import RUN_CONTEXT, SessionSpans

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.events import AckFinished, HandlerRetried, RequestFinished, SessionFinished

NAME: Final = "otel"
FLUSH_SECONDS: Final = 5.0
"""The time limit for the export of the last spans at the end of the pool, in seconds."""

_POOL_COUNTS: Final[dict[TracerProvider, int]] = {}
"""The providers that plugins of this process have created, each with the number of its pools. The
last pool shuts the provider down."""

log = logging.getLogger("workpool.otel")


@dataclass(kw_only=True, eq=False)
class Otel:
    """Traces the sessions of one pool. The fields are the settings of the plugin.

    See plugins/otel/README.md, "Settings".
    """

    write_context: bool = True
    """Whether each run writes its trace context to the metadata, so that later runs link to it."""
    tracer_provider: trace.TracerProvider | None = None
    """The provider that creates the spans.

    None: the global provider if the application has set one, else a new one that exports the spans.
    """

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            TypeError: A setting has the wrong type.
        """
        if not isinstance(self.write_context, bool):
            raise TypeError("write_context: not true or false")
        self._spans: SessionSpans | None = None

    @hookimpl
    @asynccontextmanager
    async def workpool_lifespan(self, supervisor: Supervisor) -> AsyncIterator[None]:
        """Create the tracer, and export the last spans at the end of the pool."""
        if self._spans is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        provider, created = self._choose_tracer_provider()
        settings = supervisor.settings
        self._spans = SessionSpans(
            provider.get_tracer("workpool"),
            client=settings.worker_id,
            with_messages=settings.report_errors == "message",
        )
        try:
            yield
        finally:
            self._spans.end_open_spans()
            self._spans = None
            if created is not None:
                _POOL_COUNTS[created] -= 1
                if not _POOL_COUNTS[created]:
                    del _POOL_COUNTS[created]
                    await _shut_down_tracer_provider(created)

    @hookimpl(tryfirst=True)
    @asynccontextmanager
    async def workpool_wrap_session(self, session: Session) -> AsyncIterator[None]:
        """Run the handler and the contexts of later plugins inside the session's span."""
        if self._spans is None:
            raise PluginError(NAME, "runs in a pool only")
        with self._spans.current_span(session) as context:
            if self.write_context and context:
                await _write_trace_context(session, context)
            yield

    @hookimpl
    def workpool_event(
        self, event: RequestFinished | AckFinished | HandlerRetried | SessionFinished
    ) -> None:
        """Record the event in the spans of the sessions."""
        if self._spans is not None:
            self._spans.record_event(event)

    def _choose_tracer_provider(self) -> tuple[trace.TracerProvider, TracerProvider | None]:
        """Return the provider to use, and the provider to shut down at the end of the pool.

        The second is the same provider if this plugin class has created it, else None.
        """
        if self.tracer_provider is not None:
            return self.tracer_provider, None
        current = trace.get_tracer_provider()
        if isinstance(current, TracerProvider) and current in _POOL_COUNTS:
            _POOL_COUNTS[current] += 1
            return current, current
        if not isinstance(current, trace.ProxyTracerProvider):
            return current, None
        # The service name "workpool" is only a default, but `Resource.create` prefers this name to
        # the variable OTEL_SERVICE_NAME. The merge lets the OTEL variables override the default.
        resource = Resource.create({SERVICE_NAME: "workpool"}).merge(
            OTELResourceDetector().detect()
        )
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        # Make this provider the global one, so that spans that handlers create are exported, too.
        trace.set_tracer_provider(provider)
        _POOL_COUNTS[provider] = 1
        return provider, provider


async def _write_trace_context(session: Session, context: dict[str, str]) -> None:
    """Write the run's trace context to the item's metadata.

    If the write fails with an error of the control plane, log the error and do not raise it.
    """
    try:
        await session.update_metadata(
            {f"workpool.{name}": value for name, value in context.items()}
        )
    except ControlPlaneError as error:
        session.log.debug("%s not written: %s", RUN_CONTEXT, error, extra={"error": str(error)})


async def _shut_down_tracer_provider(provider: TracerProvider) -> None:
    """Export the remaining spans, for at most `FLUSH_SECONDS`: a collector may never answer."""
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await DaemonThreads("workpool-otel", 1).run(provider.shutdown)
    except TimeoutError:
        log.warning("the last spans were not exported", extra={"seconds": FLUSH_SECONDS})
