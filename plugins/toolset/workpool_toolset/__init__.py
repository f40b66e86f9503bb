"""Executes an agent session's tool calls in a sandboxed workspace, each answered exactly once."""

from workpool_toolset.plugin import Toolset
from workpool_toolset.tools import CustomTool, ToolCall

__all__ = ["CustomTool", "ToolCall", "Toolset"]
