"""A plugin of workpool that traces sessions with OpenTelemetry."""

from workpool_otel.plugin import Otel

__all__ = ["Otel"]
