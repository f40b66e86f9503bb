"""Creates the OpenTelemetry spans of the sessions of one pool.

A session's span begins with the first request for its item (the ack), or with its handler, and ends
with the session. The requests for the item are child spans. All functions are called on the
supervisor's event loop. See plugins/otel/README.md, "Spans".
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from opentelemetry import propagate, trace
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from workpool.events import (
    AckFinished,
    HandlerRetried,
    RequestFinished,
    SessionFinished,
    current_work_id,
)
from workpool_otel import span_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

    from workpool import Session, WorkItem

SpanEvent: TypeAlias = RequestFinished | AckFinished | HandlerRetried | SessionFinished

RUN_CONTEXT: Final = "workpool.traceparent"
"""The key of the item's metadata with the trace context of the last run."""
_PREFIX: Final = "workpool."
_W3C: Final = TraceContextTextMapPropagator()
_FAILURES: Final = frozenset({"failed", "timed_out", "stalled"})


class _FinishedRequest(NamedTuple):
    """A finished request for an item. `start` and `end` are in nanoseconds since the epoch."""

    op: str
    code: str
    start: int
    end: int


@dataclass(slots=True)
class _SessionRunSpan:
    """The span of one session run, and the requests that finished before the span was created."""

    span: Span | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    """The attributes of the span and of its children."""
    early_requests: list[_FinishedRequest] = field(default_factory=list)


class SessionSpans:
    """Creates and ends the spans of the sessions of one pool.

    Args:
        tracer: Creates the spans.
        client: The name of the worker.
        with_messages: Whether a span gets the message of an error, which may contain secrets.
    """

    def __init__(self, tracer: Tracer, client: str, *, with_messages: bool) -> None:
        self._tracer = tracer
        self._client = client
        self._with_messages = with_messages
        self._runs: dict[str, _SessionRunSpan] = {}

    @contextmanager
    def current_span(self, session: Session) -> Iterator[dict[str, str]]:
        """Make the session's span current during the `with` block, and yield its trace context.

        The context is empty if the SDK creates no real spans.
        """
        run = self._runs.setdefault(session.item.id, _SessionRunSpan())
        span = self._get_or_start_span(run, session.item)
        context: dict[str, str] = {}
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            _W3C.inject(context)
            session.traceparent = context.get("traceparent", session.traceparent)
            yield context

    def record_event(self, event: SpanEvent) -> None:
        """Record an event of the pool in the span of the session that the event is about."""
        if isinstance(event, RequestFinished):
            self._record_request(event)
        elif isinstance(event, SessionFinished):
            self._end_span(event)
        elif isinstance(event, HandlerRetried):
            self._record_retry(event)
        elif event.result != "ok":
            # Forget the item's requests: its ack has failed, so no session follows.
            self._runs.pop(event.item.id, None)

    def end_open_spans(self) -> None:
        """End the spans of all sessions for which no `SessionFinished` was recorded."""
        for run in self._runs.values():
            if run.span is not None:
                run.span.end()
        self._runs.clear()

    def _record_request(self, event: RequestFinished) -> None:
        work_id = current_work_id.get()
        if work_id is None:
            return
        run = self._runs.get(work_id)
        if run is None:
            if event.op != "ack":
                # Ignore a heartbeat that releases the item after its session, because the session's
                # span has ended.
                return
            run = self._runs[work_id] = _SessionRunSpan()
        end = time.time_ns()
        request = _FinishedRequest(event.op, event.code, end - int(event.seconds * 1e9), end)
        if run.span is None:
            run.early_requests.append(request)
        else:
            self._add_request_span(run, run.span, request)

    def _record_retry(self, event: HandlerRetried) -> None:
        run = self._runs.get(event.session.item.id)
        if run is not None and run.span is not None:
            fields: dict[str, str | int] = {
                span_attributes.RETRY: event.retry,
                span_attributes.ERROR: _qualified_class_name(event.error),
            }
            run.span.add_event("retry", fields)

    def _end_span(self, event: SessionFinished) -> None:
        item = event.session.item
        run = self._runs.pop(item.id, None) or _SessionRunSpan()
        span = self._get_or_start_span(run, item)
        span.set_attributes(
            {
                span_attributes.HANDLER: event.handler,
                span_attributes.ATTEMPT: event.session.attempt,
                span_attributes.REDELIVERED: event.session.redelivered,
                span_attributes.OUTCOME: event.outcome,
            }
        )
        error = event.error
        if event.outcome in _FAILURES:
            name = event.outcome if error is None else _qualified_class_name(error)
            span.set_attribute(span_attributes.ERROR, name)
            text = str(error) if error is not None and self._with_messages else None
            span.set_status(Status(StatusCode.ERROR, text))
        span.end()

    def _get_or_start_span(self, run: _SessionRunSpan, item: WorkItem) -> Span:
        """Return the span of a run. If the run has no span yet, start it.

        With the run's span, also add the spans of the requests that were sent before it existed.
        """
        if run.span is None:
            run.attributes = {
                span_attributes.SYSTEM: "workpool",
                span_attributes.DESTINATION: item.environment_id,
                span_attributes.MESSAGE: item.id,
                span_attributes.CONVERSATION: item.session_id,
                span_attributes.CLIENT: self._client,
            }
            process = {
                span_attributes.OPERATION: "process",
                span_attributes.OPERATION_TYPE: "process",
            }
            run.span = self._tracer.start_span(
                f"process {item.environment_id}",
                context=_trace_context_of_item_creator(item),
                kind=SpanKind.CONSUMER,
                attributes=run.attributes | process,
                links=_link_to_last_run(item),
                start_time=min((request.start for request in run.early_requests), default=None),
            )
            for request in run.early_requests:
                self._add_request_span(run, run.span, request)
            run.early_requests.clear()
        return run.span

    def _add_request_span(
        self, run: _SessionRunSpan, parent: Span, request: _FinishedRequest
    ) -> None:
        """Create the span of a finished request, as a child of the session's span."""
        span = self._tracer.start_span(
            f"{request.op} {run.attributes[span_attributes.DESTINATION]}",
            context=trace.set_span_in_context(parent),
            kind=SpanKind.CLIENT,
            attributes=run.attributes | {span_attributes.OPERATION: request.op},
            start_time=request.start,
        )
        if request.op in span_attributes.SETTLE_CALLS:
            span.set_attribute(span_attributes.OPERATION_TYPE, "settle")
        if request.code.isdecimal():
            span.set_attribute(span_attributes.STATUS_CODE, int(request.code))
        if not request.code.startswith("2"):
            span.set_attribute(span_attributes.ERROR, request.code)
            span.set_status(StatusCode.ERROR)
        span.end(request.end)


def _trace_context_of_item_creator(item: WorkItem) -> Context:
    """Return the trace context of the item's creator from the item's metadata or `traceparent`."""
    context = propagate.extract(dict(item.metadata))
    if not trace.get_current_span(context).get_span_context().is_valid and item.traceparent:
        context = propagate.extract({"traceparent": item.traceparent})
    return context


def _link_to_last_run(item: WorkItem) -> list[Link]:
    """Return a link to the span of the item's last run, if the metadata name that span."""
    metadata: Mapping[str, str] = item.metadata
    names = {each: metadata[_PREFIX + each] for each in _W3C.fields if _PREFIX + each in metadata}
    last = trace.get_current_span(_W3C.extract(names)).get_span_context()
    return [Link(last)] if last.is_valid else []


def _qualified_class_name(error: BaseException) -> str:
    kind = type(error)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
