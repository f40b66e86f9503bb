"""The plugin: its settings, its tracer provider, and the hooks that feed the spans."""

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
"""Seconds by which the export of the last spans may delay the end of the pool."""

_USES: Final[dict[TracerProvider, int]] = {}
"""The providers that plugins of this process made, each with the number of pools that use it: in a
worker for several environments one may end before the others."""

log = logging.getLogger("workpool.otel")


@dataclass(kw_only=True, eq=False)
class Otel:
    """Traces the sessions of one pool. The fields are its settings.

    See plugins/otel/README.md, "Settings".
    """

    write_context: bool = True
    """Write the context of each run to the item's metadata, so that a later run links to it."""
    tracer_provider: trace.TracerProvider | None = None
    """The provider that creates the spans.

    None: the global one, or else a new one that exports them.
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
        """Create the tracer, and export the last spans at the end."""
        if self._spans is not None:
            raise PluginError(NAME, "one object serves one pool; give each its own")
        provider, own = self._tracer_provider()
        settings = supervisor.settings
        self._spans = SessionSpans(
            provider.get_tracer("workpool"),
            client=settings.worker_id,
            with_messages=settings.report_errors == "message",
        )
        try:
            yield
        finally:
            self._spans.close()
            self._spans = None
            if own is not None:
                _USES[own] -= 1
                if not _USES[own]:
                    del _USES[own]
                    await _shut_down(own)

    @hookimpl(tryfirst=True)
    @asynccontextmanager
    async def workpool_wrap_session(self, session: Session) -> AsyncIterator[None]:
        """Run the handler, and the other plugins' contexts, inside the session's span."""
        if self._spans is None:
            raise PluginError(NAME, "runs in a pool only")
        with self._spans.current_span(session) as context:
            if self.write_context and context:
                await _write_context(session, context)
            yield

    @hookimpl
    def workpool_event(
        self, event: RequestFinished | AckFinished | HandlerRetried | SessionFinished
    ) -> None:
        """Pass an event to the spans."""
        if self._spans is not None:
            self._spans.observe(event)

    def _tracer_provider(self) -> tuple[trace.TracerProvider, TracerProvider | None]:
        """Return the provider, and a second time if a plugin made it, which shuts it down."""
        if self.tracer_provider is not None:
            return self.tracer_provider, None
        current = trace.get_tracer_provider()
        if isinstance(current, TracerProvider) and current in _USES:
            _USES[current] += 1
            return current, current
        if not isinstance(current, trace.ProxyTracerProvider):
            return current, None
        # The variables are read here, because the SDK prefers an explicit attribute to them.
        resource = Resource.create({SERVICE_NAME: "workpool"}).merge(
            OTELResourceDetector().detect()
        )
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)  # for the spans of handlers
        _USES[provider] = 1
        return provider, provider


async def _write_context(session: Session, context: dict[str, str]) -> None:
    """Write the context of this run to the metadata. After a refusal only the link is missing."""
    try:
        await session.update_metadata(
            {f"workpool.{name}": value for name, value in context.items()}
        )
    except ControlPlaneError as error:
        session.log.debug("%s not written: %s", RUN_CONTEXT, error, extra={"error": str(error)})


async def _shut_down(provider: TracerProvider) -> None:
    """Export the remaining spans, for at most `FLUSH_SECONDS`, since a collector may be down."""
    try:
        async with asyncio.timeout(FLUSH_SECONDS):
            await DaemonThreads("workpool-otel", 1).run(provider.shutdown)
    except TimeoutError:
        log.warning("the last spans were not exported", extra={"seconds": FLUSH_SECONDS})
