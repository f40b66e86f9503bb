"""A plugin of workpool that runs a command for each session."""

from workpool_command.command_result import CommandFailed
from workpool_command.plugin import Command

__all__ = ["Command", "CommandFailed"]
