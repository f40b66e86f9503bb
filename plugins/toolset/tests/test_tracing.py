"""Spans of tool calls; plugins/otel tests them with an SDK."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
from workpool_toolset import ToolCall
from workpool_toolset.results import Result
from workpool_toolset.tracing import tool_span
call = ToolCall(id="use_1", name="bash", input={}, custom=False, session="sess_1")
with tool_span(call) as record:
    record(Result.error("failed"))
print("ran")
"""


def test_tool_call_runs_without_opentelemetry() -> None:
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert done.stdout == "ran\n"
