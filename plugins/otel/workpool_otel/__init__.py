"""OpenTelemetry traces of sessions: a plugin of workpool."""

from workpool_otel.plugin import Otel

__all__ = ["Otel"]
