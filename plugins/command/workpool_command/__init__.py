"""A plugin of workpool that runs a command of yours per session."""

from workpool_command.ending import CommandFailed
from workpool_command.plugin import Command

__all__ = ["Command", "CommandFailed"]
