"""Tests that a tool call works without OpenTelemetry. The tests of plugins/otel check the spans."""

from __future__ import annotations

import subprocess
import sys

PROGRAM_WITHOUT_API = """
import sys
sys.modules["opentelemetry"] = None
from workpool_toolset import ToolCall
from workpool_toolset.tool_result import ToolResult
from workpool_toolset.tracing import tool_span
call = ToolCall(id="use_1", name="bash", input={}, custom=False, session="sess_1")
with tool_span(call) as record:
    record(ToolResult.from_error("failed"))
print("ran")
"""


def test_tool_call_runs_without_opentelemetry() -> None:
    done = subprocess.run(  # noqa: S603 - no input from outside
        [sys.executable, "-c", PROGRAM_WITHOUT_API], capture_output=True, text=True, check=True
    )
    assert done.stdout == "ran\n"
