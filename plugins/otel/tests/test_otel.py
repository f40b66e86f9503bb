"""Spans of real pools: in memory, and over OTLP to a real receiver."""

from __future__ import annotations

import asyncio
import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from opentelemetry import propagate, trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from workpool import PluginError, Release, Retry, Session, handler
from workpool.events import SessionFinished
from workpool.testing import Kit, status
from workpool_command import Command
from workpool_otel import Otel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workpool.server import Item

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class SpanRecorder:
    """A provider that keeps the spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def span_named(self, name: str) -> list[ReadableSpan]:
        return [each for each in self.exporter.get_finished_spans() if each.name == name]

    def make_plugin(self, **settings: Any) -> Otel:
        return Otel(tracer_provider=self.provider, **settings)


@pytest.fixture
def span_recorder() -> SpanRecorder:
    return SpanRecorder()


@pytest.fixture
async def kit(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kit]:
    for name in ("OTEL_SERVICE_NAME", "OTEL_PROPAGATORS", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    async with Kit() as kit:
        yield kit


async def run_item(kit: Kit, plugins: list[object], **metadata: str) -> SessionFinished:
    kit.enqueue(metadata=metadata)
    async with kit.pool(*plugins):
        return await kit.wait_for(SessionFinished)


@handler
async def finish(session: Session) -> dict[str, str]:
    await session.update_metadata({"phase": "half"})
    return {"seen": session.traceparent or ""}


def span_attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return int(span.parent.span_id)


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def w3c_context(span: ReadableSpan) -> str:
    assert span.context is not None
    flags = int(span.context.trace_flags)
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{flags:02x}"


async def test_session_has_one_span_with_its_requests_as_children(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    finished = await run_item(kit, [span_recorder.make_plugin(), finish])
    item, environment = finished.session.item, finished.session.item.environment_id
    [span] = span_recorder.span_named(f"process {environment}")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    found = span_attributes(span)
    assert found.pop("messaging.client.id")
    assert found == {
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
    # Its context, "phase" and the result are written: three updates.
    operations = [each.name.partition(" ")[0] for each in sorted(calls, key=start_span)]
    assert operations == ["ack", "heartbeat", "update", "update", "update", "stop"]
    for call in calls:
        assert parent_of(call) == id_of(span)
        assert call.kind is SpanKind.CLIENT
        assert span_attributes(call)["messaging.message.id"] == item.id
        settles = "settle" if not call.name.startswith("update") else None
        assert span_attributes(call).get("messaging.operation.type") == settles
        assert start_span(span) <= start_span(call) <= (call.end_time or 0) <= (span.end_time or 0)


def start_span(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return int(span.start_time)


async def test_context_in_the_metadata_is_the_parent_of_the_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    tracer = span_recorder.provider.get_tracer("application")
    metadata: dict[str, str] = {}
    with tracer.start_as_current_span("create work") as creating:
        propagate.inject(metadata)
    finished = await run_item(kit, [span_recorder.make_plugin(), finish], **metadata)
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    assert parent_of(span) == creating.get_span_context().span_id


async def test_second_run_links_to_the_first_one(kit: Kit, span_recorder: SpanRecorder) -> None:
    @handler
    async def run_again(session: Session) -> None:
        if session.attempt == 1:
            kit.lose(item)
            await asyncio.sleep(10)

    [item] = kit.enqueue()
    async with kit.pool(span_recorder.make_plugin(), run_again):
        outcomes = [(await kit.wait_for(SessionFinished)).outcome for _ in range(2)]
    assert outcomes == ["lease_lost", "completed"]
    first, second = span_recorder.span_named(f"process {item.environment_id}")
    assert not first.links
    [link] = second.links
    assert link.context.span_id == id_of(first)
    assert span_attributes(second)["workpool.redelivered"] is True
    assert span_attributes(second)["workpool.attempt"] == 2


async def test_failed_session_has_an_error_without_its_message(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler
    async def fail(_: Session) -> None:
        raise RuntimeError("a secret")

    finished = await run_item(kit, [span_recorder.make_plugin(), fail])
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    assert span.status.status_code is StatusCode.ERROR
    assert span_attributes(span)["error.type"] == "RuntimeError"
    assert "a secret" not in span.to_json()
    assert not span.events


async def test_retry_of_a_handler_is_an_event_of_its_span(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    @handler(retry=Retry(on=RuntimeError, times=1, backoff=0.01))
    async def succeed_second_time(session: Session) -> None:
        if session.retry == 0:
            raise RuntimeError("a secret")

    finished = await run_item(kit, [span_recorder.make_plugin(), succeed_second_time])
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    [event] = span.events
    assert (event.name, dict(event.attributes or {})) == (
        "retry",
        {"workpool.retry": 1, "error.type": "RuntimeError"},
    )
    assert span_attributes(span)["workpool.outcome"] == "completed"


async def test_released_session_is_no_error(kit: Kit, span_recorder: SpanRecorder) -> None:
    @handler
    async def release(_: Session) -> None:
        raise Release("later")

    finished = await run_item(kit, [span_recorder.make_plugin(), release])
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    assert span_attributes(span)["workpool.outcome"] == "released"
    assert span.status.status_code is StatusCode.UNSET


async def test_request_that_failed_has_its_status(kit: Kit, span_recorder: SpanRecorder) -> None:
    kit.faults.add(status(503), "stop", times=1)
    finished = await run_item(kit, [span_recorder.make_plugin(), finish])
    stops = span_recorder.span_named(f"stop {finished.session.item.environment_id}")
    # The status has the name that the metrics use.
    assert span_attributes(stops[0])["error.type"] == "5xx"
    assert "error.type" not in span_attributes(stops[1])
    assert [each.status.status_code for each in stops] == [StatusCode.ERROR, StatusCode.UNSET]


async def test_context_is_written_to_the_metadata_unless_the_setting_says_no(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    written = kit.enqueue()[0]
    async with kit.pool(span_recorder.make_plugin(), finish):
        finished = await kit.wait_for(SessionFinished)
    [span] = span_recorder.span_named(f"process {written.environment_id}")
    assert item_metadata(kit, written)["workpool.traceparent"] == w3c_context(span)
    assert item_metadata(kit, written)["seen"] == w3c_context(span) == finished.session.traceparent
    [unwritten] = kit.enqueue()
    async with kit.pool(span_recorder.make_plugin(write_context=False), finish):
        await kit.wait_for(SessionFinished)
    assert "workpool.traceparent" not in item_metadata(kit, unwritten)


def item_metadata(kit: Kit, item: Item) -> dict[str, str]:
    return dict(kit.server.operations.get_item(item.environment_id, item.id).metadata)


async def test_span_of_a_handler_is_a_child_of_the_session(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    tracer = span_recorder.provider.get_tracer("reports")

    @handler
    async def render(_: Session) -> None:
        with tracer.start_as_current_span("render"):
            await asyncio.sleep(0)

    finished = await run_item(kit, [span_recorder.make_plugin(), render])
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    [child] = span_recorder.span_named("render")
    assert parent_of(child) == id_of(span)


async def test_command_gets_the_context_of_its_session(
    kit: Kit, span_recorder: SpanRecorder, tmp_path: Path
) -> None:
    command = Command(command=["sh", "-c", f"echo $TRACEPARENT >{tmp_path}/seen"])
    finished = await run_item(kit, [span_recorder.make_plugin(), command], traceparent=TRACE)
    assert finished.outcome == "completed"
    [span] = span_recorder.span_named(f"process {finished.session.item.environment_id}")
    assert (tmp_path / "seen").read_text().strip() == w3c_context(span)
    assert w3c_context(span).split("-")[1] == TRACE.split("-")[1]


async def test_item_that_another_worker_acknowledged_leaves_nothing(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    plugin = span_recorder.make_plugin()
    kit.faults.add(status(409), "ack", times=1)
    finished = await run_item(kit, [plugin, finish])
    assert len(span_recorder.span_named(f"process {finished.session.item.environment_id}")) == 1
    assert plugin._spans is None


async def test_plugin_object_serves_one_pool_at_a_time(
    kit: Kit, span_recorder: SpanRecorder
) -> None:
    plugin = span_recorder.make_plugin()
    async with kit.pool(plugin, finish):
        with pytest.raises(PluginError, match="one object serves one pool"):
            async with kit.pool(plugin, finish):
                pass


async def test_handler_of_the_readme_runs(kit: Kit, span_recorder: SpanRecorder) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - an example of ours
    finished = await run_item(kit, [span_recorder.make_plugin(), names["traced"]], job="traced")
    assert finished.outcome == "completed"


def test_setting_of_the_wrong_type_is_refused() -> None:
    wrong: dict[str, Any] = {"write_context": "yes"}
    with pytest.raises(TypeError, match="write_context"):
        Otel(**wrong)


# Export over OTLP.


class SpanCollector:
    """A collector that decodes the requests of OTLP/HTTP exporters."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.release = asyncio.Event()
        self.release.set()

    async def receive_request(self, request: web.Request) -> web.Response:
        body = await request.read()
        await self.release.wait()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        return web.Response(content_type="application/x-protobuf")

    @property
    def service_names(self) -> set[str]:
        return {
            attribute.value.string_value
            for request in self.requests
            for spans in request.resource_spans
            for attribute in spans.resource.attributes
            if attribute.key == "service.name"
        }

    @property
    def received_spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def span_names(self) -> list[str]:
        return [span.name.partition(" ")[0] for span in self.received_spans]


@pytest.fixture
async def span_collector() -> AsyncIterator[tuple[SpanCollector, str]]:
    receiver = SpanCollector()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.receive_request)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield receiver, f"http://{host}:{port}"
    receiver.release.set()
    await runner.cleanup()


async def run_worker(kit: Kit, folder: Path, plugin: str, **variables: str) -> tuple[int, str]:
    """Run `workpool run otel PLUGIN --drain` in its own process."""
    (folder / "traced.py").write_text(
        "from opentelemetry import trace\n"
        "from workpool import handler\n"
        "@handler\n"
        "async def traced(session):\n"
        "    with trace.get_tracer('reports').start_as_current_span('render'):\n"
        "        pass\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workpool", "run", "otel", plugin, "--drain"),
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "WORKPOOL_BASE_URL": kit.server.base_url,
            "WORKPOOL_ENVIRONMENT_ID": kit.server.environments[0],
            "WORKPOOL_TOKEN": kit.server.token,
            "WORKPOOL_METRICS_LISTEN": "off",
            **variables,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(50):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def test_worker_exports_its_spans_to_a_collector(
    kit: Kit, span_collector: tuple[SpanCollector, str], tmp_path: Path
) -> None:
    collector, address = span_collector
    kit.enqueue(count=3)
    status, err = await run_worker(
        kit, tmp_path, "traced", OTEL_EXPORTER_OTLP_ENDPOINT=address, OTEL_SERVICE_NAME="reports"
    )
    assert status == 0, err
    assert collector.service_names == {"reports"}
    assert collector.span_names.count("process") == 3
    assert collector.span_names.count("render") == 3
    assert collector.span_names.count("stop") == 3


async def test_collector_that_does_not_answer_delays_the_end_by_five_seconds_at_most(
    kit: Kit, span_collector: tuple[SpanCollector, str], tmp_path: Path
) -> None:
    collector, address = span_collector
    collector.release.clear()
    kit.enqueue()
    status, err = await run_worker(kit, tmp_path, "traced", OTEL_EXPORTER_OTLP_ENDPOINT=address)
    assert status == 0, err
    assert "the last spans were not exported" in err


async def test_tool_calls_of_a_session_are_children_of_its_span(
    kit: Kit, span_collector: tuple[SpanCollector, str], tmp_path: Path
) -> None:
    collector, address = span_collector
    (tmp_path / "workpool.toml").write_text(
        '[workpool.plugin.toolset]\nisolation = "none"\nmax_idle = 0.1\n'
        f'state = "{tmp_path}/state"\n'
    )
    [item] = kit.enqueue(
        script=[
            {"name": "bash", "input": {"command": "echo hello"}},
            {"name": "read", "input": {"file_path": "missing"}},
        ]
    )
    status, err = await run_worker(
        kit,
        tmp_path,
        "toolset",
        OTEL_EXPORTER_OTLP_ENDPOINT=address,
        WORKPOOL_CONFIG=str(tmp_path / "workpool.toml"),
    )
    assert status == 0, err
    [session] = [span for span in collector.received_spans if span.name.startswith("process ")]
    bash, read = sorted(
        (span for span in collector.received_spans if span.name.startswith("execute_tool ")),
        key=lambda span: span.start_time_unix_nano,
    )
    assert bash.parent_span_id == read.parent_span_id == session.span_id
    found = {each.key: each.value.string_value for each in bash.attributes}
    assert found.pop("gen_ai.tool.call.id")
    assert found == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "bash",
        "gen_ai.tool.type": "function",
        "gen_ai.conversation.id": item.session_id,
    }
    failed = {each.key: each.value.string_value for each in read.attributes}
    assert failed["error.type"] == "tool_error"
    assert "hello" not in str(collector.received_spans)


TWO_POOLS = """
import asyncio
from types import SimpleNamespace

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from workpool import Settings
from workpool_otel import Otel

ended = []

class Last(SpanProcessor):
    def shutdown(self):
        ended.append("ended")

async def main():
    pool = SimpleNamespace(settings=Settings())
    first, second = Otel().workpool_lifespan(pool), Otel().workpool_lifespan(pool)
    await first.__aenter__()
    await second.__aenter__()
    trace.get_tracer_provider().add_span_processor(Last())
    await first.__aexit__(None, None, None)
    print(ended)
    await second.__aexit__(None, None, None)
    print(ended)

asyncio.run(main())
"""


def test_provider_of_two_pools_is_shut_down_by_the_last_one() -> None:
    """In a process of its own, since a global provider cannot be removed."""
    command = [sys.executable, "-c", TWO_POOLS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
    assert done.stdout.split() == ["[]", "['ended']"]


def test_no_global_provider_was_set_by_these_tests() -> None:
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
