"""A plugin of workpool that executes the tool calls of agent sessions in a sandbox."""

from workpool_toolset.plugin import Toolset
from workpool_toolset.toolbox import CustomTool, ToolCall

__all__ = ["CustomTool", "ToolCall", "Toolset"]
