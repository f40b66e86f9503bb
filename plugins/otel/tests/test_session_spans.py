"""Tests of the spans that a pool records: attributes, parents, links and errors."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, StatusCode

from workpool import PluginError, Release, Retry, Session, handler
from workpool.events import SessionFinished
from workpool.testing import Kit, status
from workpool_command import Command
from workpool_otel import Otel

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from plugins.otel.tests.conftest import SpanRecorder
    from workpool.server import Item

WAIT_SECONDS = 50.0
"""The time limit for the end of a session, which a loaded machine does not exceed."""
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def run_item(kit: Kit, plugins: list[object], **metadata: str) -> SessionFinished:
    kit.enqueue(metadata=metadata)
    async with kit.pool(*plugins):
        return await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)


@handler
async def write_session_metadata(session: Session) -> dict[str, str]:
    await session.update_metadata({"phase": "half"})
    return {"seen": session.traceparent or ""}


def span_attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent_span_id(span: ReadableSpan) -> int:
    assert span.parent is not None
    return int(span.parent.span_id)


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def make_traceparent_of_span(span: ReadableSpan) -> str:
    assert span.context is not None
    flags = int(span.context.trace_flags)
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{flags:02x}"


async def test_session_has_one_span_with_its_requests_as_children(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    finished = await run_item(kit, [span_recorder.make_plugin(), write_session_metadata])
    item, environment = finished.session.item, finished.session.item.environment_id
    [span] = span_recorder.find_spans_by_name(f"process {environment}")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    attributes = span_attributes(span)
    assert attributes.pop("messaging.client.id")
    assert attributes == {
        "messaging.system": "workpool",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": environment,
        "messaging.message.id": item.id,
        "messaging.message.conversation_id": item.session_id,
        "workpool.handler": finished.handler,
        "workpool.attempt": 1,
        "workpool.redelivered": False,
        "workpool.outcome": "completed",
    }
    calls = [each for each in span_recorder.exporter.get_finished_spans() if each is not span]
    operations = [each.name.partition(" ")[0] for each in sorted(calls, key=start_time)]
    # Ignore the position of heartbeats. The lease renewer sends them on another thread at any time.
    without_heartbeats = [each for each in operations if each != "heartbeat"]
    assert "heartbeat" in operations
    # One update writes the trace context, one the key "phase", and one the handler's result.
    assert without_heartbeats == ["ack", "update", "update", "update", "stop"]
    for call in calls:
        assert parent_span_id(call) == span_id(span)
        assert call.kind is SpanKind.CLIENT
        assert span_attributes(call)["messaging.message.id"] == item.id
        settles = "settle" if not call.name.startswith("update") else None
        assert span_attributes(call).get("messaging.operation.type") == settles
        assert start_time(span) <= start_time(call) <= (call.end_time or 0) <= (span.end_time or 0)


def start_time(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return int(span.start_time)


async def test_trace_context_in_metadata_is_parent_of_session_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    tracer = span_recorder.provider.get_tracer("application")
    metadata: dict[str, str] = {}
    with tracer.start_as_current_span("create work") as creating:
        propagate.inject(metadata)
    finished = await run_item(
        kit, [span_recorder.make_plugin(), write_session_metadata], **metadata
    )
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    assert parent_span_id(span) == creating.get_span_context().span_id


async def test_span_of_second_run_links_to_span_of_first_run(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler
    async def lose_lease_in_first_attempt(session: Session) -> None:
        if session.attempt == 1:
            kit.lose(item)
            await asyncio.Event().wait()

    [item] = kit.enqueue()
    async with kit.pool(span_recorder.make_plugin(), lose_lease_in_first_attempt):
        outcomes = [
            (await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)).outcome for _ in range(2)
        ]
    assert outcomes == ["lease_lost", "completed"]
    first, second = span_recorder.find_spans_by_name(f"process {item.environment_id}")
    assert not first.links
    [link] = second.links
    assert link.context.span_id == span_id(first)
    assert span_attributes(second)["workpool.redelivered"] is True
    assert span_attributes(second)["workpool.attempt"] == 2


async def test_span_of_failed_session_has_error_class_without_message(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler
    async def raise_runtime_error(_: Session) -> None:
        raise RuntimeError("a secret")

    finished = await run_item(kit, [span_recorder.make_plugin(), raise_runtime_error])
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    assert span.status.status_code is StatusCode.ERROR
    assert span_attributes(span)["error.type"] == "RuntimeError"
    assert "a secret" not in span.to_json()
    assert not span.events


async def test_retry_of_handler_is_recorded_as_event_of_session_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler(retry=Retry(on=RuntimeError, times=1, backoff=0.01))
    async def fail_first_handler_call(session: Session) -> None:
        if session.retry == 0:
            raise RuntimeError("a secret")

    finished = await run_item(kit, [span_recorder.make_plugin(), fail_first_handler_call])
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    [event] = span.events
    assert (event.name, dict(event.attributes or {})) == (
        "retry",
        {"workpool.retry": 1, "error.type": "RuntimeError"},
    )
    assert span_attributes(span)["workpool.outcome"] == "completed"


async def test_span_of_released_session_has_no_error_status(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler
    async def release_item(_: Session) -> None:
        raise Release("later")

    finished = await run_item(kit, [span_recorder.make_plugin(), release_item])
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    assert span_attributes(span)["workpool.outcome"] == "released"
    assert span.status.status_code is StatusCode.UNSET


async def test_span_of_failed_request_has_error_status(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    kit.faults.add(status(503), "stop", times=1)
    finished = await run_item(kit, [span_recorder.make_plugin(), write_session_metadata])
    stops = span_recorder.find_spans_by_name(f"stop {finished.session.item.environment_id}")
    # The pool's events contain "5xx" for every status from 500 to 599.
    assert span_attributes(stops[0])["error.type"] == "5xx"
    assert "error.type" not in span_attributes(stops[1])
    assert [each.status.status_code for each in stops] == [StatusCode.ERROR, StatusCode.UNSET]


async def test_trace_context_is_written_to_metadata_unless_plugin_setting_disables_it(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    written = kit.enqueue()[0]
    async with kit.pool(span_recorder.make_plugin(), write_session_metadata):
        finished = await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)
    [span] = span_recorder.find_spans_by_name(f"process {written.environment_id}")
    assert item_metadata(kit, written)["workpool.traceparent"] == make_traceparent_of_span(span)
    assert (
        item_metadata(kit, written)["seen"]
        == make_traceparent_of_span(span)
        == finished.session.traceparent
    )
    [unwritten] = kit.enqueue()
    async with kit.pool(span_recorder.make_plugin(write_context=False), write_session_metadata):
        await kit.wait_for(SessionFinished, timeout=WAIT_SECONDS)
    assert "workpool.traceparent" not in item_metadata(kit, unwritten)


def item_metadata(kit: Kit, item: Item) -> dict[str, str]:
    return dict(kit.server.operations.get_item(item.environment_id, item.id).metadata)


async def test_span_that_handler_creates_is_child_of_session_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    tracer = span_recorder.provider.get_tracer("reports")

    @handler
    async def create_child_span(_: Session) -> None:
        with tracer.start_as_current_span("render"):
            await asyncio.sleep(0)

    finished = await run_item(kit, [span_recorder.make_plugin(), create_child_span])
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    [child] = span_recorder.find_spans_by_name("render")
    assert parent_span_id(child) == span_id(span)


async def test_command_gets_trace_context_of_its_session(
    kit: Kit, span_recorder: SpanRecorder, tmp_path: Path
) -> None:
    command = Command(command=["sh", "-c", f"echo $TRACEPARENT >{tmp_path}/seen"])
    finished = await run_item(kit, [span_recorder.make_plugin(), command], traceparent=TRACEPARENT)
    assert finished.outcome == "completed"
    [span] = span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}")
    assert (tmp_path / "seen").read_text().strip() == make_traceparent_of_span(span)
    assert make_traceparent_of_span(span).split("-")[1] == TRACEPARENT.split("-")[1]


async def test_item_whose_ack_is_refused_leaves_no_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    plugin = span_recorder.make_plugin()
    kit.faults.add(status(409), "ack", times=1)
    finished = await run_item(kit, [plugin, write_session_metadata])
    assert (
        len(span_recorder.find_spans_by_name(f"process {finished.session.item.environment_id}"))
        == 1
    )
    assert plugin._spans is None


async def test_plugin_object_in_two_running_pools_raises_plugin_error(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    plugin = span_recorder.make_plugin()
    async with kit.pool(plugin, write_session_metadata):
        with pytest.raises(PluginError, match="one object serves one pool"):
            async with kit.pool(plugin, write_session_metadata):
                pass


async def test_handler_of_readme_example_completes_session(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - the example of the readme
    finished = await run_item(kit, [span_recorder.make_plugin(), names["traced"]], job="traced")
    assert finished.outcome == "completed"


def test_otel_plugin_setting_of_wrong_type_raises_type_error() -> None:
    settings: dict[str, Any] = {"write_context": "yes"}
    with pytest.raises(TypeError, match="write_context"):
        Otel(**settings)


def test_plugin_with_own_tracer_provider_sets_no_global_provider() -> None:
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
