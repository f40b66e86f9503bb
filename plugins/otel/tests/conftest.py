"""Fixtures: a control plane with pools, and a provider that stores spans in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from workpool.testing import Kit
from workpool_otel import Otel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class SpanRecorder:
    """A tracer provider that stores finished spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def find_spans_by_name(self, name: str) -> list[ReadableSpan]:
        return [each for each in self.exporter.get_finished_spans() if each.name == name]

    def make_plugin(self, **settings: Any) -> Otel:
        return Otel(tracer_provider=self.provider, **settings)


@pytest.fixture
def span_recorder() -> SpanRecorder:
    return SpanRecorder()


@pytest.fixture
async def kit(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kit]:
    """A `workpool.testing.Kit` in an environment without OTEL variables."""
    for name in ("OTEL_SERVICE_NAME", "OTEL_PROPAGATORS", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    async with Kit() as kit:
        yield kit
