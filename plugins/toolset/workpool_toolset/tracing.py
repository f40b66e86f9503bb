"""Creates spans of tool calls if the API of OpenTelemetry is installed.

See plugins/toolset/README.md, "Tracing".
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

try:
    from opentelemetry import trace
except ModuleNotFoundError:
    _available = False
else:
    _available = True

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workpool_toolset.tool_result import ToolResult
    from workpool_toolset.toolbox import ToolCall

TOOL_ERROR: Final = "tool_error"


@contextmanager
def tool_span(call: ToolCall) -> Iterator[Callable[[ToolResult], None]]:
    """Run the `with` block in a span of the tool call. Yield a function to record the result.

    Arguments and results are not recorded: they may be large, and contain secrets.
    """
    if not _available:
        yield lambda _: None
        return
    attributes = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call.name,
        "gen_ai.tool.call.id": call.id,
        "gen_ai.tool.type": "function",
        "gen_ai.conversation.id": call.session,
    }
    tracer = trace.get_tracer("workpool.toolset")
    with tracer.start_as_current_span(
        f"execute_tool {call.name}", attributes=attributes, record_exception=False
    ) as span:

        def record_tool_result(result: ToolResult) -> None:
            if result.is_error:
                span.set_attribute("error.type", TOOL_ERROR)
                span.set_status(trace.StatusCode.ERROR)

        yield record_tool_result
