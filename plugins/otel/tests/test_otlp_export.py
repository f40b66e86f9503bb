"""Tests of the export of spans from a worker process to a collector, by OTLP over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from workpool.testing import Kit

WAIT_SECONDS = 50.0
"""The time limit for the end of a worker, which a loaded machine does not exceed."""
WORKER_PROGRAM = """
import sys
import workpool_otel.plugin
from workpool.cli import main

workpool_otel.plugin.FLUSH_SECONDS = float(sys.argv.pop(1))
main()
"""


class SpanCollector:
    """An OTLP/HTTP collector that stores the received requests."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def handle_request(self, request: web.Request) -> web.Response:
        body = await request.read()
        await self.may_answer.wait()
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
    collector = SpanCollector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.handle_request)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield collector, f"http://{host}:{port}"
    collector.may_answer.set()
    await runner.cleanup()


async def run_worker(
    kit: Kit, directory: Path, plugin: str, *, flush_seconds: float = 40.0, **variables: str
) -> tuple[int, str]:
    """Run `workpool run otel PLUGIN --drain` in a process; return its exit status and log.

    `flush_seconds` replaces the time limit for the export of the last spans.
    """
    (directory / "traced.py").write_text(
        "from opentelemetry import trace\n"
        "from workpool import handler\n"
        "@handler\n"
        "async def traced(session):\n"
        "    with trace.get_tracer('reports').start_as_current_span('render'):\n"
        "        pass\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER_PROGRAM, str(flush_seconds)),
        *("run", "otel", plugin, "--drain"),
        cwd=directory,
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
    async with asyncio.timeout(WAIT_SECONDS):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


async def test_worker_process_exports_its_spans_to_collector(
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


async def test_collector_that_does_not_answer_does_not_prevent_end_of_worker(
    kit: Kit, span_collector: tuple[SpanCollector, str], tmp_path: Path
) -> None:
    collector, address = span_collector
    collector.may_answer.clear()
    kit.enqueue()
    status, err = await run_worker(
        kit, tmp_path, "traced", flush_seconds=0.5, OTEL_EXPORTER_OTLP_ENDPOINT=address
    )
    assert status == 0, err
    assert "the last spans were not exported" in err


async def test_tool_call_spans_are_children_of_session_span(
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
    bash_attributes = {each.key: each.value.string_value for each in bash.attributes}
    assert bash_attributes.pop("gen_ai.tool.call.id")
    assert bash_attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "bash",
        "gen_ai.tool.type": "function",
        "gen_ai.conversation.id": item.session_id,
    }
    read_attributes = {each.key: each.value.string_value for each in read.attributes}
    assert read_attributes["error.type"] == "tool_error"
    assert "hello" not in str(collector.received_spans)


TWO_POOLS_PROGRAM = """
import asyncio
from types import SimpleNamespace

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from workpool import Settings
from workpool_otel import Otel

shutdowns = []

class ShutdownRecorder(SpanProcessor):
    def shutdown(self):
        shutdowns.append("shutdown")

async def main():
    pool = SimpleNamespace(settings=Settings())
    first, second = Otel().workpool_lifespan(pool), Otel().workpool_lifespan(pool)
    await first.__aenter__()
    await second.__aenter__()
    trace.get_tracer_provider().add_span_processor(ShutdownRecorder())
    await first.__aexit__(None, None, None)
    print(shutdowns)
    await second.__aexit__(None, None, None)
    print(shutdowns)

asyncio.run(main())
"""


def test_tracer_provider_of_two_pools_is_shut_down_when_last_pool_ends() -> None:
    """The pools run in another process, because no process can remove its global provider."""
    command = [sys.executable, "-c", TWO_POOLS_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - no input from outside
    assert done.stdout.split() == ["[]", "['shutdown']"]
