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


class Spans:
    """A provider that keeps the spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def named(self, name: str) -> list[ReadableSpan]:
        return [each for each in self.exporter.get_finished_spans() if each.name == name]

    def plugin(self, **settings: Any) -> Otel:
        return Otel(tracer_provider=self.provider, **settings)


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def kit(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kit]:
    for name in ("OTEL_SERVICE_NAME", "OTEL_PROPAGATORS", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    async with Kit() as kit:
        yield kit


async def run(kit: Kit, plugins: list[object], **metadata: str) -> SessionFinished:
    kit.enqueue(metadata=metadata)
    async with kit.pool(*plugins):
        return await kit.wait_for(SessionFinished)


@handler
async def done(session: Session) -> dict[str, str]:
    await session.update_metadata({"phase": "half"})
    return {"seen": session.traceparent or ""}


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent_of(span: ReadableSpan) -> int:
    assert span.parent is not None
    return int(span.parent.span_id)


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def in_w3c(span: ReadableSpan) -> str:
    assert span.context is not None
    flags = int(span.context.trace_flags)
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{flags:02x}"


async def test_session_has_one_span_with_its_requests_as_children(kit: Kit, spans: Spans) -> None:
    finished = await run(kit, [spans.plugin(), done])
    item, environment = finished.session.item, finished.session.item.environment_id
    [span] = spans.named(f"process {environment}")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    found = attributes(span)
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
    calls = [each for each in spans.exporter.get_finished_spans() if each is not span]
    # Its context, "phase" and the result are written: three updates.
    operations = [each.name.partition(" ")[0] for each in sorted(calls, key=started)]
    assert operations == ["ack", "heartbeat", "update", "update", "update", "stop"]
    for call in calls:
        assert parent_of(call) == id_of(span)
        assert call.kind is SpanKind.CLIENT
        assert attributes(call)["messaging.message.id"] == item.id
        settles = "settle" if not call.name.startswith("update") else None
        assert attributes(call).get("messaging.operation.type") == settles
        assert started(span) <= started(call) <= (call.end_time or 0) <= (span.end_time or 0)


def started(span: ReadableSpan) -> int:
    assert span.start_time is not None
    return int(span.start_time)


async def test_context_in_the_metadata_is_the_parent_of_the_span(kit: Kit, spans: Spans) -> None:
    tracer = spans.provider.get_tracer("application")
    metadata: dict[str, str] = {}
    with tracer.start_as_current_span("create work") as creating:
        propagate.inject(metadata)
    finished = await run(kit, [spans.plugin(), done], **metadata)
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    assert parent_of(span) == creating.get_span_context().span_id


async def test_second_run_links_to_the_first_one(kit: Kit, spans: Spans) -> None:
    @handler
    async def again(session: Session) -> None:
        if session.attempt == 1:
            kit.lose(item)
            await asyncio.sleep(10)

    [item] = kit.enqueue()
    async with kit.pool(spans.plugin(), again):
        outcomes = [(await kit.wait_for(SessionFinished)).outcome for _ in range(2)]
    assert outcomes == ["lease_lost", "completed"]
    first, second = spans.named(f"process {item.environment_id}")
    assert not first.links
    [link] = second.links
    assert link.context.span_id == id_of(first)
    assert attributes(second)["workpool.redelivered"] is True
    assert attributes(second)["workpool.attempt"] == 2


async def test_failed_session_has_an_error_without_its_message(kit: Kit, spans: Spans) -> None:
    @handler
    async def fail(_: Session) -> None:
        raise RuntimeError("a secret")

    finished = await run(kit, [spans.plugin(), fail])
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "RuntimeError"
    assert "a secret" not in span.to_json()
    assert not span.events


async def test_retry_of_a_handler_is_an_event_of_its_span(kit: Kit, spans: Spans) -> None:
    @handler(retry=Retry(on=RuntimeError, times=1, backoff=0.01))
    async def second_time(session: Session) -> None:
        if session.retry == 0:
            raise RuntimeError("a secret")

    finished = await run(kit, [spans.plugin(), second_time])
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    [event] = span.events
    assert (event.name, dict(event.attributes or {})) == (
        "retry",
        {"workpool.retry": 1, "error.type": "RuntimeError"},
    )
    assert attributes(span)["workpool.outcome"] == "completed"


async def test_released_session_is_no_error(kit: Kit, spans: Spans) -> None:
    @handler
    async def release(_: Session) -> None:
        raise Release("later")

    finished = await run(kit, [spans.plugin(), release])
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    assert attributes(span)["workpool.outcome"] == "released"
    assert span.status.status_code is StatusCode.UNSET


async def test_request_that_failed_has_its_status(kit: Kit, spans: Spans) -> None:
    kit.faults.add(status(503), "stop", times=1)
    finished = await run(kit, [spans.plugin(), done])
    stops = spans.named(f"stop {finished.session.item.environment_id}")
    assert attributes(stops[0])["error.type"] == "5xx"  # as the metrics count it
    assert "error.type" not in attributes(stops[1])
    assert [each.status.status_code for each in stops] == [StatusCode.ERROR, StatusCode.UNSET]


async def test_context_is_written_to_the_metadata_unless_the_setting_says_no(
    kit: Kit, spans: Spans
) -> None:
    written = kit.enqueue()[0]
    async with kit.pool(spans.plugin(), done):
        finished = await kit.wait_for(SessionFinished)
    [span] = spans.named(f"process {written.environment_id}")
    assert metadata_of(kit, written)["workpool.traceparent"] == in_w3c(span)
    assert metadata_of(kit, written)["seen"] == in_w3c(span) == finished.session.traceparent
    [unwritten] = kit.enqueue()
    async with kit.pool(spans.plugin(write_context=False), done):
        await kit.wait_for(SessionFinished)
    assert "workpool.traceparent" not in metadata_of(kit, unwritten)


def metadata_of(kit: Kit, item: Item) -> dict[str, str]:
    return dict(kit.server.operations.get(item.environment_id, item.id).metadata)


async def test_span_of_a_handler_is_a_child_of_the_session(kit: Kit, spans: Spans) -> None:
    tracer = spans.provider.get_tracer("reports")

    @handler
    async def render(_: Session) -> None:
        with tracer.start_as_current_span("render"):
            await asyncio.sleep(0)

    finished = await run(kit, [spans.plugin(), render])
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    [child] = spans.named("render")
    assert parent_of(child) == id_of(span)


async def test_command_gets_the_context_of_its_session(
    kit: Kit, spans: Spans, tmp_path: Path
) -> None:
    command = Command(command=["sh", "-c", f"echo $TRACEPARENT >{tmp_path}/seen"])
    finished = await run(kit, [spans.plugin(), command], traceparent=TRACE)
    assert finished.outcome == "completed"
    [span] = spans.named(f"process {finished.session.item.environment_id}")
    assert (tmp_path / "seen").read_text().strip() == in_w3c(span)
    assert in_w3c(span).split("-")[1] == TRACE.split("-")[1]


async def test_item_that_another_worker_acknowledged_leaves_nothing(kit: Kit, spans: Spans) -> None:
    plugin = spans.plugin()
    kit.faults.add(status(409), "ack", times=1)
    finished = await run(kit, [plugin, done])
    assert len(spans.named(f"process {finished.session.item.environment_id}")) == 1
    assert plugin._spans is None


async def test_plugin_object_serves_one_pool_at_a_time(kit: Kit, spans: Spans) -> None:
    plugin = spans.plugin()
    async with kit.pool(plugin, done):
        with pytest.raises(PluginError, match="one object serves one pool"):
            async with kit.pool(plugin, done):
                pass


async def test_handler_of_the_readme_runs(kit: Kit, spans: Spans) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - an example of ours
    finished = await run(kit, [spans.plugin(), names["traced"]], job="traced")
    assert finished.outcome == "completed"


def test_setting_of_the_wrong_type_is_refused() -> None:
    wrong: dict[str, Any] = {"write_context": "yes"}
    with pytest.raises(TypeError, match="write_context"):
        Otel(**wrong)


# Export over OTLP.


class Receiver:
    """A collector that decodes the requests of OTLP/HTTP exporters."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.release = asyncio.Event()
        self.release.set()

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        await self.release.wait()
        if request.headers.get("Content-Encoding") == "gzip" and body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        return web.Response(content_type="application/x-protobuf")

    @property
    def services(self) -> set[str]:
        return {
            attribute.value.string_value
            for request in self.requests
            for spans in request.resource_spans
            for attribute in spans.resource.attributes
            if attribute.key == "service.name"
        }

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def names(self) -> list[str]:
        return [span.name.partition(" ")[0] for span in self.spans]


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield receiver, f"http://{host}:{port}"
    receiver.release.set()
    await runner.cleanup()


async def worker(kit: Kit, folder: Path, plugin: str, **variables: str) -> tuple[int, str]:
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
    kit: Kit, receiver: tuple[Receiver, str], tmp_path: Path
) -> None:
    collector, address = receiver
    kit.enqueue(count=3)
    status, err = await worker(
        kit, tmp_path, "traced", OTEL_EXPORTER_OTLP_ENDPOINT=address, OTEL_SERVICE_NAME="reports"
    )
    assert status == 0, err
    assert collector.services == {"reports"}
    assert collector.names.count("process") == 3
    assert collector.names.count("render") == 3
    assert collector.names.count("stop") == 3


async def test_collector_that_does_not_answer_delays_the_end_by_five_seconds_at_most(
    kit: Kit, receiver: tuple[Receiver, str], tmp_path: Path
) -> None:
    collector, address = receiver
    collector.release.clear()
    kit.enqueue()
    status, err = await worker(kit, tmp_path, "traced", OTEL_EXPORTER_OTLP_ENDPOINT=address)
    assert status == 0, err
    assert "the last spans were not exported" in err


async def test_tool_calls_of_a_session_are_children_of_its_span(
    kit: Kit, receiver: tuple[Receiver, str], tmp_path: Path
) -> None:
    collector, address = receiver
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
    status, err = await worker(
        kit,
        tmp_path,
        "toolset",
        OTEL_EXPORTER_OTLP_ENDPOINT=address,
        WORKPOOL_CONFIG=str(tmp_path / "workpool.toml"),
    )
    assert status == 0, err
    [session] = [span for span in collector.spans if span.name.startswith("process ")]
    bash, read = sorted(
        (span for span in collector.spans if span.name.startswith("execute_tool ")),
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
    assert "hello" not in str(collector.spans)


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
